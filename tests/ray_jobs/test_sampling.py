"""A training's system metrics are those of the machines that train, each under a name of its own."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from infra.site import Site
from ray_jobs.sampling import Machine
from tests.fixtures_verbs import SHORT, tavlad
from tests.raylet import second_raylet


def test_samples_are_those_of_mlflows_monitors() -> None:
    monitors, machine = [CPUMonitor(), DiskMonitor(), NetworkMonitor()], Machine()
    known: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        known |= monitor.aggregate_metrics()
    found = machine.sample()
    assert {name for name in found if not name.startswith("gpu_")} == known.keys()
    for name in ("system_memory_usage_percentage", "disk_usage_megabytes"):
        assert found[name] == pytest.approx(known[name], rel=0.1)


def test_processors_are_measured_from_one_sample_to_the_next() -> None:
    machine, end = Machine(), time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    assert machine.sample()["cpu_utilization_percentage"] > 10 / psutil.cpu_count()


@pytest.mark.slow
def test_every_node_of_a_training_tells_how_busy_it_is(
    local_site: Site, packed_clips: dict[str, Any], tmp_path: Path
) -> None:
    apart = ["--set", "resources.workers=2", "--set", "resources.placement=STRICT_SPREAD", "--set", "stage1.lr=0.0025"]
    with second_raylet(local_site, tmp_path, num_cpus=1, address="127.0.0.2"):
        said = tavlad("train", "demo", "--dataset", "real", *SHORT, *apart, "--no-register")
    assert said.code == 0, said.err
    client = MlflowClient(local_site.mlflow_uri)
    experiment = client.get_experiment_by_name("tavlad/real")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=3)
    assert {run.data.tags["kind"] for run in runs} == {"train", "stage1", "stage2"}
    told = {name for run in runs for name in run.data.metrics if name.startswith("system/")}
    names = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage")
    assert {f"system/node{rank}/{name}" for rank in (0, 1) for name in names} <= told
    assert all(name.startswith(("system/node0/", "system/node1/")) for name in told)
