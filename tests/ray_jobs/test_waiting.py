"""What a cluster has no room for yet is waited for aloud, and done as soon as a node that has it joins."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.site import Site
from tests.raylet import second_raylet

pytestmark = pytest.mark.slow

_ASK = """
from infra.site import activate, load_site
site = load_site()
activate(site)
import ray
from ray_jobs.cluster import connect, result_of

connect(site, lambda text: print(text, flush=True))

@ray.remote(num_cpus=1, num_gpus=1)
def task():
    return "done"

print(result_of(task.remote()), flush=True)
"""


def test_a_wait_says_what_is_missing_until_a_node_has_it(local_site: Site, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _ASK], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        began = time.monotonic()
        missing = "1 GPU asked for, 0 of 0 free"
        first, second = (next(line for line in driver.stdout if missing in line) for _ in range(2))
        assert time.monotonic() - began > 50
        assert "waiting for room on the cluster, " in first
        assert first != second
        with second_raylet(local_site, tmp_path, num_cpus=1, num_gpus=1):
            assert [line for line in driver.stdout if "GPU" not in line] == ["done\n"]
    assert driver.returncode == 0
