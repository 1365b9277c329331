"""A sweep on real clips that is interrupted, by kill -9 or Ctrl-C: the same trials, the same results, none twice."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from infra import process
from infra.site import Site
from shards.store import Store, open_store

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

_SPACE = """
[stage1]
lr = [0.001, 0.01]

[model]
num_clusters = [4, 8]
gru_width = [8, 16]
"""
_TINY = [
    *("--set", "model.trunk=resnet18", "--set", "model.weights=none", "--set", "training.crop=64"),
    *("--set", "training.batch_size=8", "--set", "stage1.epochs=4", "--set", "stage2.epochs=1"),
]


TRIAL = "ImplicitFunc"  # what Ray Tune calls the actor of a function that is a trial


def _tavlad(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ray_jobs.cli", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr}


@pytest.fixture
def sweep(packed_clips: dict[str, Any], tmp_path: Path) -> list[str]:
    """A grid of eight trials over three actions of Weizmann, as the command's arguments."""
    (tmp_path / "space.toml").write_text(_SPACE)
    space = ["--space", str(tmp_path / "space.toml"), "--search", "grid", "--scheduler", "none", "--finalists", "0"]
    return ["tune", "demo", "--dataset", "real", *space, *_TINY]


def until(holds: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)
    return found


def _over(store: Store) -> dict[str, dict[str, Any]]:
    paths = [path for path in store.list() if "/trials/" in path]
    return {path: json.loads(store.read(path)) for path in paths}


def _results(trials: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All of the trials but how fast they were."""
    return {
        path: (trial["state"], [{**row, "clips_per_second": None} for row in trial["rows"]])
        for path, trial in trials.items()
    }


def actors_of(site: Site, name: str) -> list[psutil.Process]:
    """The actors of a class, of this test's own cluster."""
    cluster = {member.pid for member in process.members(f"{site.state}:ray")}
    found: list[psutil.Process] = []
    for each in psutil.process_iter():
        try:
            is_actor = name in " ".join(each.cmdline())
            if is_actor and cluster & {parent.pid for parent in each.parents()}:
                found.append(each)
        except psutil.Error:
            continue
    return found


_LEFT = """
from infra.site import activate, load_site
site = load_site()
activate(site)
import ray
from ray_jobs.cluster import connect
connect(site)
groups = ray.util.placement_group_table()
print(sum(each["state"] != "REMOVED" for each in groups.values()))
"""


def placement_groups_left() -> int:
    return int(subprocess.run([sys.executable, "-c", _LEFT], capture_output=True, text=True, check=True).stdout)


def test_killed_sweep_ends_as_an_undisturbed_one(local_site: Site, sweep: list[str]) -> None:
    store = open_store(local_site.sweeps_uri, local_site.s3)
    command = [sys.executable, "-m", "ray_jobs.cli", *sweep]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            until(lambda: [path for path in store.list() if "/checkpoints/" in path])
            until(lambda: actors_of(local_site, TRIAL))[0].kill()
            until(lambda: _over(store))
            time.sleep(random.uniform(0, 3))
        finally:
            driver.kill()
    before = _over(store)
    assert 0 < len(before) < 8, "killed in between"

    document = _tavlad(*sweep)
    assert document["trials"] == 8
    assert "trials are over already and are not repeated" in document["said"]
    killed = _over(store)
    assert len(killed) == 8
    assert {path: killed[path] for path in before} == before, "what was over is not done again"
    assert [trial["state"] for trial in killed.values()] == ["finished"] * 8
    assert not [path for path in store.list() if "/checkpoints/" in path]

    client = MlflowClient(local_site.mlflow_uri)
    experiment = client.get_experiment_by_name("tavlad/real")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    (parent,) = [run for run in runs if run.data.tags["kind"] == "sweep"]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) == 8
    assert {run.data.tags["state"] for run in nested} == {"finished"}
    for run in nested:
        points = client.get_metric_history(run.info.run_id, "held_out/score")
        assert sorted(point.step for point in points) == [1, 2, 3, 4], "each epoch is told once"
    artifacts = {each.path for each in client.list_artifacts(parent.info.run_id)}
    assert {"trials.parquet", "parallel_coordinates.png"} <= artifacts

    for path in store.list():
        store.delete(path)
    _tavlad(*sweep)
    assert _results(_over(store)) == _results(killed)
    until(lambda: not placement_groups_left(), 60)


@pytest.mark.timeout(1200)  # two sweeps and a third of one
def test_sweep_killed_at_its_rung_ends_as_an_undisturbed_one(local_site: Site, sweep: list[str]) -> None:
    """Trials wait after one of four epochs, and two of the eight go on: whatever the order, and not trained twice."""
    sweep = ["halving" if word == "none" else word for word in sweep]
    sweep += ["--set", "training.seed=6"]  # no other test's trials
    store = open_store(local_site.sweeps_uri, local_site.s3)
    others = set(store.list())

    def written(folder: str) -> dict[str, dict[str, Any]]:
        paths = [path for path in store.list() if folder in path and path not in others]
        return {path.rpartition("/")[2]: json.loads(store.read(path)) for path in paths}

    command = [sys.executable, "-m", "ray_jobs.cli", *sweep]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            until(lambda: len(written("/waiting/")) >= 3)
        finally:
            driver.kill()
    waiting = written("/waiting/")
    assert {len(trial["rows"]) for trial in waiting.values()} == {1}

    document = _tavlad(*sweep)
    assert (document["trials"], document["stopped"], document["epochs"]) == (8, 6, 6 * 1 + 2 * 4)
    assert "epoch 1: 2 of 8 trials go on" in document["said"]
    first, killed = written("/waiting/"), written("/trials/")
    assert {name: first[name] for name in waiting} == waiting, "nobody came to the rung twice"
    assert {name: trial["rows"][:1] for name, trial in killed.items()} == {
        name: trial["rows"] for name, trial in first.items()
    }, "who goes on goes on from there"
    scores = {name: trial["rows"][0]["held_out/score"] for name, trial in killed.items()}
    best = sorted(scores, key=lambda name: -scores[name])[:2]
    assert {name for name, trial in killed.items() if trial["state"] == "finished"} == set(best)

    for path in set(store.list()) - others:
        store.delete(path)
    _tavlad(*sweep)
    assert _results(written("/trials/")) == _results(killed)


def test_ctrl_c_stops_says_the_best_so_far_and_how_to_go_on(local_site: Site, sweep: list[str]) -> None:
    """On a terminal, where a table shows the trials while they run."""
    sweep = [*sweep, "--set", "training.seed=5"]  # no other test's trials
    store = open_store(local_site.sweeps_uri, local_site.s3)
    others = _over(store)
    reader, terminal = pty.openpty()
    size = {"COLUMNS": "160", "LINES": "60", "TERM": "xterm"}
    command = [sys.executable, "-m", "ray_jobs.cli", *sweep]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | size) as driver:
        os.close(terminal)
        try:
            shown = _read(reader, until_shown=r"[1-7] of 8 trials are over, best \d")
            driver.send_signal(signal.SIGINT)
            said = _read(reader)
        finally:
            driver.kill()
        os.close(reader)
    assert driver.returncode == 130, said
    for column in ("trial", "state", "epoch", "held-out", "stage1.lr", "model.gru_width"):
        assert column in shown
    assert "running" in shown
    assert "left" in shown
    assert re.search(r"best so far: held-out \d+\.\d% with lr ", said)
    assert "trials are over; the same command goes on" in said
    until(lambda: not actors_of(local_site, TRIAL), 60)
    until(lambda: not placement_groups_left(), 60)

    before = {path: trial for path, trial in _over(store).items() if path not in others}
    assert 0 < len(before) < 8
    document = _tavlad(*sweep)
    assert document["trials"] == 8
    after = {path: trial for path, trial in _over(store).items() if path not in others}
    assert len(after) == 8
    assert {path: after[path] for path in before} == before


def _read(terminal: int, until_shown: str = "") -> str:
    """What a program shows, until it shows something or, by default, ends."""
    shown, deadline = "", time.monotonic() + 300
    while not (until_shown and re.search(until_shown, shown)):
        assert time.monotonic() < deadline, shown
        try:
            content = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that nobody has the terminal any more
            content = b""
        if not content:
            assert not until_shown, shown
            break
        shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", content.decode(errors="replace"))
    return shown
