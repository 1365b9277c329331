"""Placement groups of a real cluster: what nobody uses is removed, what somebody uses or may use soon stays."""

import subprocess
import sys

import pytest

from infra.site import Site

pytestmark = pytest.mark.slow

_LOOK = """
from infra.site import activate, load_site
site = load_site()
activate(site)
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In
from ray_jobs import trial_group
from ray_jobs.cluster import connect, placement_groups

connect(site)
bundle = {"memory": 1.0}
used, unused, of_another_size = (ray.util.placement_group([bundle] * size) for size in (2, 2, 1))
for each in (used, unused, of_another_size):
    assert each.wait(30)

@ray.remote(num_cpus=0)
class Worker:
    def ready(self):
        return True

worker = Worker.options(scheduling_strategy=In(placement_group=used)).remote()
ray.get(worker.ready.remote())
names = {used.id.hex(): "used", unused.id.hex(): "unused", of_another_size.id.hex(): "of another size"}
trial_group._SECONDS_WITHOUT_ACTORS = 0.0
leftovers = trial_group.Leftovers(2)
for _ in range(2):
    leftovers.remove()
    print(*sorted(names[key] for key in placement_groups()), sep=", ")
ray.kill(worker)
while len(placement_groups()) > 1:
    leftovers.remove()
print(*(names[key] for key in placement_groups()))
"""


def test_groups_that_had_no_actor_twice_are_removed(local_site: Site) -> None:
    done = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["of another size, unused, used", "of another size, used", "of another size"]
