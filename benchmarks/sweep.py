"""What a grid of 27 trials on shared features costs, with and without halving, against 27 stage-1 runs from frames.

python benchmarks/sweep.py ../shared/data/weizmann [--epochs 10] [--seeds 0 1 2] [--trunk resnet34] [--crop 224]

Grid: 3 learning rates x K in {16, 32, 64} x U in {64, 128, 256}. A seed has a site of its own, new: the grid's time is
`tavlad tune`'s from its start to its end, codebooks and filling included. The sweep with halving comes after it and
finds these; what they took the grid is added to its time. The 27 runs from frames are not run: their seconds are
computed from an epoch of the smallest model (all 27 are taken to be as quick), measured here after some steps that warm
up, through the same loop, in one process with all cores. All are wall seconds of one machine, one after the other: a
machine that others use meanwhile distorts the ratios. `--without-frames` leaves the comparison out: what halving
spends and chooses.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_LRS, _KS, _US = [1e-3, 3e-3, 1e-2], [16, 32, 64], [64, 128, 256]

_FROM_FRAMES = """
import json, sys, time
from infra.site import activate, load_site
activate(load_site())
import torch
from ray_jobs.codebook import build_untrained
from ray_jobs.plan import open_set
from ray_jobs.recipe import load_recipe
from ray_jobs.trial import trial_loading
from shards.held_out import held_out
from shards.read import ClipLoader
from tavlad.train import Listeners, StagePlan, fit
changes = json.loads(sys.argv[1])
site = load_site()
recipe = load_recipe("ta-vlad", [*changes, "stage1.epochs=1"], "weizmann")
store, index = open_set(site, "weizmann", recipe)
seen = held_out(index, 1, 0.25, recipe.training.seed)
model, _ = build_untrained(site, recipe, len(index.actions))
train, test = (
    ClipLoader(seen, store, 1, part, trial_loading(recipe, training=part == "train")) for part in ("train", "test")
)
plan = StagePlan(number=1, stage=recipe.stage1, training=recipe.training)
fit(model, plan, test, None, Listeners(on_epoch=lambda report: None))  # warms up
started = time.perf_counter()
fit(model, plan, train, test, Listeners(on_epoch=lambda report: None))
print(json.dumps(time.perf_counter() - started))
"""


def _run(home: Path, *command: str) -> str:
    environment = os.environ | {"TAVLAD_HOME": str(home)}
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def _tavlad(home: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(_run(home, "-m", "ray_jobs.cli", "--json", *arguments))


def _pack(home: Path, data: Path, num_frames: int) -> None:
    where = ("--splits", str(data / "splits_hmdb_format"), "--num-frames", str(num_frames))
    _tavlad(home, "pack", str(data / "videos"), "--name", "weizmann", "--layout", "hmdb51", *where)


def _sweep(home: Path, space: Path, scheduler: str, changes: list[str]) -> dict[str, Any]:
    """The sweep's document, its seconds, and of these the ones before its first trial."""
    sets = [part for change in changes for part in ("--set", change)]
    how = ("--search", "grid", "--scheduler", scheduler, "--finalists", "0", "--space", str(space))
    command = ("--json", "tune", "ta-vlad", "--dataset", "weizmann", "--split", "1", *how, *sets)
    environment = os.environ | {"TAVLAD_HOME": str(home)}
    started, prepared = time.perf_counter(), 0.0
    with subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        for line in driver.stderr:
            print(f"{time.perf_counter() - started:7.1f} {line}", end="", file=sys.stderr)
            if "clip views for all trials together" in line:
                prepared = time.perf_counter() - started
        document = json.loads(driver.stdout.read().splitlines()[-1])
    print(json.dumps(document), file=sys.stderr)
    return document | {"seconds": time.perf_counter() - started, "prepared": prepared}


def _trials(home: Path, sweep: str) -> list[dict[str, Any]]:
    program = f"""
import json
from infra.site import load_site
from shards.store import open_store
site = load_site()
store = open_store(site.sweeps_uri + "/{sweep}", site.s3)
print(json.dumps([json.loads(store.read(path)) for path in store.list("trials/")]))
"""
    return json.loads(_run(home, "-c", program))


def _told(home: Path, sweep: str) -> int:
    """How many trials MLflow has under the sweep's one run, no trial twice."""
    program = f"""
from infra.site import activate, load_site
site = load_site()
activate(site)
from mlflow import MlflowClient
client = MlflowClient(site.mlflow_uri)
runs = client.search_runs([each.experiment_id for each in client.search_experiments()], max_results=1000)
(parent,) = [run for run in runs if run.data.tags.get("tavlad.run") == "{sweep}"]
below = [run.data.tags["tavlad.run"] for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
assert len(set(below)) == len(below), below
print(len(below))
"""
    return int(_run(home, "-c", program))


def _top1(trials: list[dict[str, Any]], changes: dict[str, Any]) -> float:
    (trial,) = [each for each in trials if each["changes"] == changes]
    return trial["rows"][-1]["held_out/top1"]


def _compare(folder: Path, options: argparse.Namespace, space: Path, seed: int) -> dict[str, Any]:
    changes = [
        f"stage1.epochs={options.epochs}",
        f"model.trunk={options.trunk}",
        f"model.weights={options.weights}",
        f"training.crop={options.crop}",
        f"training.seed={seed}",
        "training.batch_size=8",
        "codebook.frames_per_video=4",
        *options.set,
    ]
    home = folder / str(seed)
    home.mkdir(exist_ok=True)
    found: dict[str, Any] = {"seed": seed}
    try:
        _tavlad(home, "up")
        _pack(home, options.data, options.frames)
        if not options.without_frames:
            smallest = [*changes, f"model.num_clusters={_KS[0]}", f"model.gru_width={_US[0]}"]
            found["frames_epoch_seconds"] = float(_run(home, "-c", _FROM_FRAMES, json.dumps(smallest)))
            print(f"an epoch from frames: {found['frames_epoch_seconds']:.1f} s", file=sys.stderr)
        whole = found["grid"] = _sweep(home, space, "none", changes)
        stopping = found["halving"] = _sweep(home, space, "halving", changes)
        trials = _trials(home, whole["sweep"])
        found["told"] = [_told(home, each["sweep"]) for each in (whole, stopping)]
        assert found["told"] == [27, 27], f"MLflow has {found['told']} trials of the grid and with halving"
    finally:
        _run(home, "-m", "ray_jobs.cli", "down")
        shutil.rmtree(home, ignore_errors=True)
    if not options.without_frames:
        found["frames_seconds"] = 27 * options.epochs * found["frames_epoch_seconds"]
        assert whole["prepared"], "the site is not new: its grid was done"
        found["grid_share"] = whole["seconds"] / found["frames_seconds"]
        found["halving_seconds"] = whole["prepared"] + stopping["seconds"] - stopping["prepared"]
        found["halving_share"] = found["halving_seconds"] / found["frames_seconds"]
    found["halving_epochs_share"] = stopping["epochs"] / whole["epochs"]
    # What halving chose, as the full grid knows it.
    found["grid_best"] = max(trial["rows"][-1]["held_out/top1"] for trial in trials)
    found["halving_choice"] = _top1(trials, stopping["best"]["changes"])
    found["curves"] = {
        json.dumps(trial["changes"]): [[row["held_out/top1"], row["held_out/loss"]] for row in trial["rows"]]
        for trial in trials
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of Weizmann's videos and split files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trunk", default="resnet34")
    parser.add_argument("--weights", default="none", help="imagenet, none or a path; none is as quick")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of the recipe")
    parser.add_argument("--without-frames", action="store_true", help="only what halving spends and chooses")
    parser.add_argument("--home", type=Path, help="folder of the seeds' sites, which may be up already")
    parser.add_argument("--out", type=Path, help="file for all that was found, a JSON line a seed")
    options = parser.parse_args()
    options.data = options.data.absolute()
    lines = [f"stage1.lr = {_LRS}", f"model.num_clusters = {_KS}", f"model.gru_width = {_US}"]
    with tempfile.TemporaryDirectory(prefix="sweep-", dir="/tmp") as made:
        folder = options.home or made
        space = Path(folder) / "space.toml"
        space.write_text("\n".join(lines) + "\n")
        for seed in options.seeds:
            found = _compare(Path(folder), options, space, seed)
            print(f"in MLflow, under one run each: {' and '.join(map(str, found['told']))} trials", file=sys.stderr)
            line = f"| {seed} | {found['halving_epochs_share']:.0%} | {found['grid_best']:.1%} |"
            line += f" {found['halving_choice']:.1%} |"
            if not options.without_frames:
                line += (
                    f" {found['frames_seconds']:.0f} s (computed) | {found['grid']['seconds']:.0f} s, "
                    f"{found['grid_share']:.1%} | {found['halving_seconds']:.0f} s, {found['halving_share']:.1%} |"
                )
            print(line, flush=True)
            if options.out is not None:
                with options.out.open("a") as out:
                    out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
