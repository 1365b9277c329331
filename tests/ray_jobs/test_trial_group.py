"""A sweep whose trials are groups of workers: what it finds is what trials of one worker find, and nothing stays.

The process of its first trial is killed: its workers end, what they held is free again, and the trial is tried again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.site import Site
from shards.store import Store, open_store
from tests.fixtures_verbs import tavlad
from tests.ray_jobs.test_tune_chaos import TRIAL, actors_of, placement_groups_left, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

_SPACE = "[stage1]\nlr = [0.00001, 0.01, 1e30]\n"
_TINY = [
    *("--set", "model.trunk=resnet18", "--set", "model.weights=none", "--set", "training.crop=64"),
    *("--set", "training.batch_size=7", "--set", "training.precision=float32", "--set", "training.seed=11"),
    *("--set", "stage1.epochs=4", "--set", "model.num_clusters=4", "--set", "model.gru_width=8"),
]


def _trials(store: Store) -> dict[float, dict[str, Any]]:
    trials = [json.loads(store.read(path)) for path in store.list() if "/trials/" in path]
    return {trial["changes"]["stage1.lr"]: trial for trial in trials}


def test_trials_by_two_workers_are_those_by_one(local_site: Site, packed_clips: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(_SPACE)
    search = ["--space", str(tmp_path / "space.toml"), "--search", "grid", "--finalists", "0", "--at-once", "1"]
    sweep = ["tune", "demo", "--dataset", "real", *search, *_TINY]
    store = open_store(local_site.sweeps_uri, local_site.s3)
    others = store.list()
    command = [sys.executable, "-m", "ray_jobs.cli", *sweep, "--workers-per-trial", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        try:
            until(lambda: driver.poll() is not None or len(actors_of(local_site, "RayTrainWorker")) == 2, 480)
            were_workers = driver.poll() is None
            killed = actors_of(local_site, TRIAL)
            for trial in killed:
                trial.kill()
            said = driver.stderr.read()
        finally:
            driver.kill()
    assert were_workers, said
    assert killed
    assert driver.wait() == 0, said
    by_group = _trials(store)
    until(lambda: not actors_of(local_site, "RayTrainWorker") and not placement_groups_left(), 60)

    for path in set(store.list()) - set(others):
        store.delete(path)
    assert tavlad(*sweep).code == 0
    by_one = _trials(store)
    assert {lr: trial["state"] for lr, trial in by_group.items()} == {lr: each["state"] for lr, each in by_one.items()}
    assert {trial["state"] for trial in by_one.values()} == {"finished", "stopped", "diverged"}
    for lr, trial in by_one.items():
        assert by_group[lr]["reason"] == trial["reason"]
        assert len(by_group[lr]["rows"]) == len(trial["rows"])
        for ours, theirs in zip(by_group[lr]["rows"], trial["rows"], strict=True):
            assert ours["epoch"] == theirs["epoch"]
            for name in ("train/loss", "held_out/loss", "train/top1", "held_out/top1"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (lr, name)
