"""MLflow away for a minute of a real training, and for all of another: every metric is there afterwards, once."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.site import Site
from shards.store import open_store
from tests.mlflow_server import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

_SECONDS_AWAY = 60
_SHORT = [
    *("stage1.epochs=12", "stage2.epochs=2", "training.batch_size=8", "training.crop=64", "training.evaluate_every=1"),
    *("model.num_clusters=4", "model.gru_width=16"),
]
# The embedded site with another MLflow server: one that the verbs do not start themselves.
_TRAIN = """
import sys
from dataclasses import replace
from infra.site import activate, load_site
site = replace(load_site(), mlflow_uri=sys.argv[1])
activate(site)
from ray_jobs.console import Console
from ray_jobs.recipe import load_recipe
from ray_jobs.train import train
train(site, load_recipe("demo", sys.argv[3:], "outage"), 1, Console(), register=sys.argv[2] == "register")
"""


@pytest.fixture
def server() -> Generator[MlflowServer]:
    """A server of its own, not started; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="tavlad-mlflow-") as folder:
        server = MlflowServer(Path(folder))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def real_set(local_site: Site, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three actions of real clips, packed as `outage`."""
    folder = tmp_path_factory.mktemp("outage")
    for action in ("bend", "jack", "wave2"):
        (folder / action).symlink_to(shared_data / "weizmann" / "videos" / action)
    command = ["pack", str(folder), "--name", "outage", "--num-frames", "8", "--short-side", "96"]
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", *command], check=True)


def start_training(server: MlflowServer, how: str, seed: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _TRAIN, server.uri, how, *_SHORT, f"training.seed={seed}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
        cwd=Path(__file__).parents[2],
    )


def ended_well(training: "subprocess.Popen[str]") -> str:
    said, _ = training.communicate(timeout=500)
    assert training.returncode == 0, said
    return said


def runs_of(server: MlflowServer, kind: str) -> list[str]:
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("tavlad/outage")
    if experiment is None:
        return []
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")]


def steps_told(server: MlflowServer, kind: str, metric: str) -> list[tuple[int, float]]:
    (run_id,) = runs_of(server, kind)
    return [(each.step, each.value) for each in MlflowClient(server.uri).get_metric_history(run_id, metric)]


def assert_all_is_told_once(server: MlflowServer, site: Site) -> None:
    """What MLflow holds is what the last checkpoint remembers: each epoch once, in order, in both its runs."""
    (parent,) = runs_of(server, "train")
    name = MlflowClient(server.uri).get_run(parent).data.tags["tavlad.run"]
    store = open_store(site.runs_uri, site.s3)
    last = max(path for path in store.list(f"{name}/checkpoints/") if path.endswith("history.json"))
    history = json.loads(store.read(last))
    assert [row["stage"] for row in history] == [1] * 12 + [2] * 2
    for metric in ("train/loss", "test/top1"):
        for stage in (1, 2):
            expected = [(row["epoch"], row[metric]) for row in history if row["stage"] == stage]
            assert steps_told(server, f"stage{stage}", metric) == expected
        assert steps_told(server, "train", metric) == [(place, row[metric]) for place, row in enumerate(history, 1)]
    assert MlflowClient(server.uri).get_run(parent).info.status == "FINISHED"


def test_a_minute_without_mlflow_in_mid_run_loses_nothing(
    local_site: Site, real_set: None, server: MlflowServer
) -> None:
    server.start()
    training = start_training(server, "no", seed=1)
    while not (runs_of(server, "stage1") and steps_told(server, "stage1", "train/loss")):
        assert training.poll() is None, training.communicate()[0]
        time.sleep(0.2)
    server.stop()
    assert training.poll() is None, "stopped too late to prove anything"
    time.sleep(_SECONDS_AWAY)
    server.start()
    ended_well(training)
    ended_well(start_training(server, "no", seed=1))  # tells what waits still, if the training ended meanwhile
    assert_all_is_told_once(server, local_site)


def test_a_run_without_mlflow_is_told_and_registered_whole_afterwards(
    local_site: Site, real_set: None, server: MlflowServer
) -> None:
    said = ended_well(start_training(server, "no", seed=2))
    assert "for the next process" in said
    server.start()
    said = ended_well(start_training(server, "register", seed=2))
    assert "trained already" in said
    assert "registered tavlad-outage-split1 version 1 (now best)" in said
    assert_all_is_told_once(server, local_site)
