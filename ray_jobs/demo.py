"""tavlad demo: everything once on one machine, from video files to a registered model that names a video's action."""

import json
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from infra.site import Site
from ray_jobs.cluster import connect, num_cpus
from ray_jobs.console import Console
from ray_jobs.pack import Packed, pack
from ray_jobs.plan import locate_set
from ray_jobs.recipe import load_recipe
from ray_jobs.register import RegisteredRun
from ray_jobs.report import DemoModel, DemoReport, Filmstrip, Step, write_report
from ray_jobs.train import train
from shards.datasets import VideoSet, scan
from shards.plan import PackOptions
from shards.render import render_videos
from shards.scenes import PAIRS
from shards.video import decode_clip
from tavlad.errors import UserError
from tavlad.registry_queries import registered_models

NUM_FRAMES = 16
SHORT_SIDE = 128
CLIPS_PER_ACTION = 36
VARIANTS = {"gru": ["model.temporal=gru"], "sum": ["model.temporal=sum"]}
"""What is compared: the same recipe with one field changed."""
_STEPS_AN_EPOCH = 12
"""Of the rendered set, whose epochs the recipe gives."""
_SPLIT = 1
_SHOWN_VIDEOS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """What the demo runs on."""

    name: str
    videos: VideoSet
    pairs: tuple[tuple[str, str], ...]
    """Pairs of actions that only the order of the frames tells apart; none for videos of the user."""


class _Clock:
    """Wall time of each step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._started = time.monotonic()

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        started = time.monotonic()
        yield
        self.steps.append(Step(name=name, seconds=time.monotonic() - started))

    def total(self) -> float:
        return time.monotonic() - self._started


def run_demo(site: Site, folder: Path | None, name: str | None, workers: int, console: Console) -> dict[str, Any]:
    """Videos, packing, two trainings, registration, prediction in a fresh process, a report; returns the summary."""
    if site.state is None:
        raise UserError("the demo runs on this machine alone: leave --site out")
    clock = _Clock()
    with clock.step("videos"):
        data = _own_videos(folder, name) if folder is not None else _rendered_videos(site.state, console)
    with clock.step("packing"):
        options = PackOptions(num_frames=NUM_FRAMES, short_side=SHORT_SIDE)
        packed = pack(site, data.videos, locate_set(site, data.name), options, console)
    connect(site, console.say)
    resources = [f"resources.workers={workers}", f"resources.cpus_per_worker={num_cpus() / workers}"]
    schedule = _schedule(len(packed.index.clips(_SPLIT, "train")))
    runs: list[RegisteredRun] = []
    for variant, changes in VARIANTS.items():
        with clock.step(f"training, temporal = {variant}"):
            recipe = load_recipe("demo", [*changes, *schedule, *resources], data.name)
            # A demo shows this code: what other code trained is left aside.
            run = train(site, recipe, _SPLIT, console, other_code="begin anew")
            assert run is not None, "training registers"
            runs.append(run)
    with clock.step("prediction"):
        strips = _predict(site, data, packed, runs[0].model.name, console)
    # Asked for at the end: a later run may have taken the alias from an earlier one.
    best = {(row.name, row.version) for row in registered_models(site.mlflow_uri) if row.is_best}
    runs = [replace(run, model=replace(run.model, is_best=(run.model.name, run.model.version) in best)) for run in runs]
    report = _report(site, data, packed, runs, clock.steps, strips)
    path = site.state / "reports" / f"{data.name}.html"
    write_report(path, report)
    _show(report, path, console)
    return {
        "dataset": data.name,
        "wall_seconds": round(clock.total(), 1),
        "models": [run.document() for run in runs],
        "tracking_uri": site.mlflow_uri,
        "report": str(path),
    }


def _rendered_videos(state: Path, console: Console) -> _Data:
    folder = state / "demo" / "videos"
    num_videos = CLIPS_PER_ACTION * 2 * len(PAIRS)
    console.heading(f"Rendering {num_videos} videos of {2 * len(PAIRS)} actions in {folder}")
    with console.progress("videos rendered", num_videos) as advance:
        render_videos(
            folder,
            CLIPS_PER_ACTION,
            seed=0,
            progress=lambda done, total: advance(done, ""),
            num_samples=NUM_FRAMES,
        )
    return _Data(name="demo", videos=scan("demo", folder, "table", folder / "videos.csv"), pairs=PAIRS)


def _own_videos(folder: Path, name: str | None) -> _Data:
    folder = folder.resolve()
    # "my_set/videos" is a common way to lay a set out; "videos" would be no name for it.
    name = name or (folder.parent.name if folder.name in ("videos", "clips") else folder.name)
    return _Data(name=name, videos=scan(name, folder, "folders"), pairs=())


def _schedule(num_clips: int) -> list[str]:
    """The epochs for a set of this size: small sets get more, so that the number of steps stays about the same."""
    recipe = load_recipe("demo", dataset="any")
    steps_an_epoch = -(-num_clips // recipe.training.batch_size)
    more = max(1, round(_STEPS_AN_EPOCH / steps_an_epoch))
    return [
        f"stage1.epochs={more * recipe.stage1.epochs}",
        f"stage1.decay_every={more * recipe.stage1.decay_every}",
        f"stage2.epochs={more * recipe.stage2.epochs}",
        f"training.evaluate_every={more * recipe.training.evaluate_every}",
    ]


def _predict(site: Site, data: _Data, packed: Packed, model: str, console: Console) -> list[Filmstrip]:
    """What the best model says of a few test videos, asked for in a process of its own."""
    console.heading(f"Predicting {_SHOWN_VIDEOS} test videos with {model}@best, in a fresh process")
    keys = packed.index.clips(_SPLIT, "test").table["source"].to_pylist()
    chosen = {keys[row] for row in np.linspace(0, len(keys) - 1, min(_SHOWN_VIDEOS, len(keys))).astype(int)}
    videos = {video.path: video.action for video in data.videos.videos if video.name in chosen}
    command = [sys.executable, "-m", "ray_jobs.cli", "--json", "predict", f"{model}@best", *map(str, videos), "--top=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the prediction failed:\n{done.stderr.strip()}")
    predictions = json.loads(done.stdout.splitlines()[-1])["predictions"]
    said = {Path(each["video"]): each for each in predictions}
    console.table(
        ["video", "shows", "predicted", "probability"],
        [
            [path.name, action, said[path]["action"], f"{said[path]['probability']:.1%}"]
            for path, action in videos.items()
        ],
    )
    return [
        Filmstrip(
            frames_THWC=decode_clip(path, 8, SHORT_SIDE).frames_THWC,
            true_action=action,
            predicted_action=said[path]["action"],
            probability=said[path]["probability"],
        )
        for path, action in videos.items()
    ]


def within_pairs(run: RegisteredRun, actions: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> float | None:
    """Share of the test clips told from their time-reversed partner, 0 to 1; None without pairs."""
    if not pairs:
        return None
    shares = [run.scores.within((actions.index(first), actions.index(second))) for first, second in pairs]
    return sum(shares) / len(shares)


def _report(
    site: Site, data: _Data, packed: Packed, runs: list[RegisteredRun], steps: list[Step], strips: list[Filmstrip]
) -> DemoReport:
    actions = packed.index.actions
    models = [
        DemoModel(
            variant=run.plan.recipe.model.variant,
            temporal=run.plan.recipe.model.temporal,
            split=run.plan.split,
            name=run.model.name,
            version=str(run.model.version),
            is_best=run.model.is_best,
            test_top1=run.scores.top(1),
            test_mean_class=run.scores.mean_class,
            within_pair_top1=within_pairs(run, actions, data.pairs),
            confusion_AA=run.scores.confusion,
            epochs=run.history,
            run_url=run.run_url,
        )
        for run in runs
    ]
    return DemoReport(
        dataset=data.name,
        num_clips=len(packed.index.clips_table),
        actions=actions,
        models=models,
        steps=steps,
        tracking_uri=site.mlflow_uri,
        filmstrips=strips,
    )


def _show(report: DemoReport, path: Path, console: Console) -> None:
    rows = [
        [
            model.variant,
            model.temporal,
            str(model.split),
            f"{model.test_top1:.1%}",
            "" if model.within_pair_top1 is None else f"{model.within_pair_top1:.1%}",
            f"{model.name} v{model.version}" + (" (best)" if model.is_best else ""),
        ]
        for model in report.models
    ]
    console.table(["variant", "temporal", "split", "test top-1", "within pairs", "registered"], rows, title="Models")
    console.say(f"Report: {path}")
    console.say(f"MLflow: {report.tracking_uri}")
    console.say(f"Next:   tavlad predict {report.models[0].name}@best VIDEO")
