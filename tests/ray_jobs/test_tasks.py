"""Tasks on a real cluster of two nodes, one of which is killed while they run there: every one is done all the same."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.site import Site
from tests.raylet import second_raylet

pytestmark = pytest.mark.slow

_RUN = """
import os, signal, sys, time
from pathlib import Path
from infra.site import activate, load_site
site = load_site()
activate(site)
import ray
from ray_jobs.cluster import connect
from ray_jobs.console import Console
from ray_jobs.tasks import run_tasks

begun = Path(sys.argv[1])
connect(site)
home = ray.get_runtime_context().get_node_id()
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.1)

@ray.remote(num_cpus=1)
def task(number, progress):
    if ray.get_runtime_context().get_node_id() != home:
        (begun / f"away{number}").touch()
        time.sleep(600)  # ends with its node
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # all are in flight when the node has left
        time.sleep(0.1)
    if number == 0 and not (begun / "killed").exists():
        (begun / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    progress(1)
    return number

print(run_tasks(task, [(number,) for number in range(20)], "tasks", 20, Console()))
"""


def test_a_node_that_leaves_and_a_worker_that_is_killed_lose_no_task(local_site: Site, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RUN, str(tmp_path)]
    with (
        second_raylet(local_site, tmp_path, num_cpus=5) as leaving,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver,
    ):
        deadline = time.monotonic() + 240
        while not any(tmp_path.glob("away*")):
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline, (tmp_path / "raylet.log").read_text()
            time.sleep(0.1)
        leaving.kill()
        out, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert str(list(range(20))) in out.splitlines()
    assert (tmp_path / "killed").exists()
