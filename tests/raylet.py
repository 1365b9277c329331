"""A second Ray node beside the embedded site's, on this machine: it joins, and it can be lost as a machine is lost."""

import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from infra import process
from infra.local_ray import PATIENCE
from infra.process import Program
from infra.site import Site
from tests.ports import free_port


class Raylet:
    """The node's processes."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def kill(self) -> None:
        """kill -9 of all of them: nothing of the node says goodbye."""
        for member in process.members(self._mark):
            member.kill()


# `ray start` refuses a second node on loopback, and without loopback it would listen on all of the machine's addresses.
_NODE = """
import json, sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams

node = Node(RayParams(**json.loads(sys.argv[1])), head=False, shutdown_at_exit=False, spawn_reaper=False)
while True:
    time.sleep(60)
"""


@contextmanager
def second_raylet(
    site: Site, folder: Path, *, num_cpus: int, num_gpus: int = 0, address: str = "127.0.0.1"
) -> Generator[Raylet]:
    """Starts one with so many CPUs and GPUs, be they there or not; ended with the block.

    Ray Train takes nodes of one address for one machine: 127.0.0.2 makes it another.
    """
    settings = {
        "gcs_address": site.ray_address,
        "node_ip_address": address,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "object_store_memory": 100_000_000,
        "min_worker_port": 0,
        "max_worker_port": 0,
        "node_manager_port": 0,
        "include_log_monitor": False,
        # Named, or the raylet waits 15 s for its agents to write them down, which a busy machine may not manage.
        "metrics_export_port": free_port(),
        "metrics_agent_port": free_port(),
        "dashboard_agent_listen_port": free_port(),
        "runtime_env_agent_port": free_port(),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | site.ray_environment() | site.worker_environment() | PATIENCE
    mark, log = f"{folder}:raylet", folder / "raylet.log"
    command = (sys.executable, "-c", _NODE, json.dumps(settings))
    pid = process.start(Program(command=command, environment=environment, folder=folder), mark, log)
    try:
        yield Raylet(mark)
    finally:
        process.end(mark, pid, grace_s=5)
