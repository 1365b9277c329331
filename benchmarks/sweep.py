"""What a grid of 27 trials on shared features costs, with and without ASHA, against 27 stage-1 runs from frames.

python benchmarks/sweep.py ../shared/data/weizmann [--epochs 10] [--seeds 0 1 2] [--trunk resnet34] [--crop 224]

Grid: 3 learning rates x K in {16, 32, 64} x U in {64, 128, 256}. Each sweep is `tavlad tune` on a site of its own, so
its time includes codebooks and filling. The 27 runs from frames are not run: their seconds are computed from an epoch
of the smallest and one of the largest model, each measured here after one that warms up, through the same loop, in one
process with all cores; between them by the GRU's multiplications, K U (512 + U). All are wall seconds of one machine,
one after the other: a machine that others use meanwhile distorts the ratios.
"""

import argparse
import json
import os
import shutil
import statistics
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
site, seconds = load_site(), {}
for clusters, width in json.loads(sys.argv[2]):
    size = [f"model.num_clusters={clusters}", f"model.gru_width={width}"]
    recipe = load_recipe("ta-vlad", [*changes, *size, "stage1.epochs=2", "training.evaluate_every=1"], "weizmann")
    store, index = open_set(site, "weizmann", recipe)
    seen = held_out(index, 1, 0.25, recipe.training.seed)
    model, _ = build_untrained(site, recipe, len(index.actions))
    train, test = (
        ClipLoader(seen, store, 1, part, trial_loading(recipe, training=part == "train")) for part in ("train", "test")
    )
    moments = [time.perf_counter()]
    plan = StagePlan(number=1, stage=recipe.stage1, training=recipe.training)
    fit(model, plan, train, test, Listeners(on_epoch=lambda report: moments.append(time.perf_counter())))
    seconds[f"{clusters} {width}"] = moments[2] - moments[1]  # the first epoch warms up
print(json.dumps(seconds))
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


def _sweep(home: Path, space: Path, scheduler: str, changes: list[str]) -> tuple[float, dict[str, Any]]:
    sets = [part for change in changes for part in ("--set", change)]
    how = ("--search", "grid", "--scheduler", scheduler, "--finalists", "0", "--space", str(space))
    started = time.perf_counter()
    document = _tavlad(home, "tune", "ta-vlad", "--dataset", "weizmann", "--split", "1", *how, *sets)
    return time.perf_counter() - started, document


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


def _top1(trials: list[dict[str, Any]], changes: dict[str, Any]) -> float:
    (trial,) = [each for each in trials if each["changes"] == changes]
    return trial["rows"][-1]["held_out/top1"]


def _mean_epoch(smallest: float, largest: float) -> float:
    """Seconds of an epoch, over the nine sizes of the grid, from those of the two extreme ones."""
    work = [clusters * width * (512 + width) for clusters in _KS for width in _US]
    share = (statistics.mean(work) - min(work)) / (max(work) - min(work))
    return smallest + share * max(0.0, largest - smallest)


def _compare(folder: Path, options: argparse.Namespace, space: Path, seed: int) -> dict[str, Any]:
    changes = [
        f"stage1.epochs={options.epochs}",
        f"model.trunk={options.trunk}",
        f"model.weights={options.weights}",
        f"training.crop={options.crop}",
        f"training.seed={seed}",
        "training.batch_size=8",
        "codebook.frames_per_video=4",
    ]
    found: dict[str, Any] = {"seed": seed}
    results: dict[str, list[dict[str, Any]]] = {}
    for scheduler in ("none", "asha"):
        home = folder / f"{scheduler}-{seed}"
        home.mkdir()
        try:
            _tavlad(home, "up")
            _pack(home, options.data, options.frames)
            seconds, document = _sweep(home, space, scheduler, changes)
            results[scheduler] = _trials(home, document["sweep"])
            found[scheduler] = {"seconds": seconds, "epochs": document["epochs"], "best": document["best"]}
            if scheduler == "none":
                sizes = json.dumps([[_KS[0], _US[0]], [_KS[-1], _US[-1]]])
                epochs = json.loads(_run(home, "-c", _FROM_FRAMES, json.dumps(changes), sizes))
                found["frames_epoch_seconds"] = epochs
                found["frames_seconds"] = 27 * options.epochs * _mean_epoch(*epochs.values())
        finally:
            _run(home, "-m", "ray_jobs.cli", "down")
            shutil.rmtree(home, ignore_errors=True)
    found["grid_share"] = found["none"]["seconds"] / found["frames_seconds"]
    found["asha_share"] = found["asha"]["seconds"] / found["frames_seconds"]
    found["asha_epochs_share"] = found["asha"]["epochs"] / found["none"]["epochs"]
    # What ASHA chose, as the full grid knows it.
    found["grid_best"] = max(trial["rows"][-1]["held_out/top1"] for trial in results["none"])
    found["asha_choice"] = _top1(results["none"], found["asha"]["best"]["changes"])
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
    options = parser.parse_args()
    options.data = options.data.absolute()
    lines = [f"stage1.lr = {_LRS}", f"model.num_clusters = {_KS}", f"model.gru_width = {_US}"]
    with tempfile.TemporaryDirectory(prefix="sweep-", dir="/tmp") as folder:
        space = Path(folder) / "space.toml"
        space.write_text("\n".join(lines) + "\n")
        for seed in options.seeds:
            found = _compare(Path(folder), options, space, seed)
            print(
                f"| {seed} | {found['frames_seconds']:.0f} s (computed) | {found['none']['seconds']:.0f} s, "
                f"{found['grid_share']:.1%} | {found['asha']['seconds']:.0f} s, {found['asha_share']:.1%} | "
                f"{found['asha_epochs_share']:.0%} | {found['grid_best']:.1%} | {found['asha_choice']:.1%} |",
                flush=True,
            )
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
