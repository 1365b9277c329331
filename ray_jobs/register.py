"""tavlad register: what a training leaves behind in MLflow, and its model in the registry."""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.site import Site
from ray_jobs.codebook import build_untrained
from ray_jobs.console import Console
from ray_jobs.plan import TrainingPlan, plan_training
from ray_jobs.recipe import Recipe
from ray_jobs.served_model import stage_code
from ray_jobs.worker import HISTORY, SCORES, load_scores
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.store import open_store
from shards.table import write_table
from tavlad import figures
from tavlad.checkpoint import STATE, load_model
from tavlad.metrics import Scores
from tavlad.registry import Registered, register
from tavlad.runlog import RUN_TAG, RunSpec
from tavlad.tracking import Tracker

_SECONDS_BETWEEN_SYSTEM_METRICS = 10.0
_SECONDS_FOR_DELIVERY = 30.0
_ATTENTION_CLIPS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredRun:
    """A finished training and its registered model."""

    plan: TrainingPlan
    model: Registered
    scores: Scores
    """Of the last epoch on the test part."""
    history: list[dict[str, Any]]
    """One row an epoch: stage, epoch and metrics."""
    best_on_test: float
    """The highest test/top1 of any epoch; chosen on the test part, so not a result to report."""
    run_url: str

    def document(self) -> dict[str, Any]:
        """What a script reads; the alias is that of the moment of registration."""
        return {
            "name": self.model.name,
            "version": self.model.version,
            "alias": "best" if self.model.is_best else None,
            "split": self.plan.split,
            "variant": self.plan.recipe.model.variant,
            "test_top1": self.scores.top(1),
        }


class RunRecords:
    """The MLflow runs of one training: a parent and one for each stage. Nothing here waits for the server."""

    def __init__(self, site: Site, plan: TrainingPlan, index: Index) -> None:
        self._site = site
        self._plan = plan
        self._folder = (site.state or Path(tempfile.gettempdir(), "tavlad")) / "spool" / plan.name
        tags = {
            "dataset": plan.dataset_name,
            "split": str(plan.split),
            "variant": plan.recipe.model.variant,
            "fingerprint": plan.dataset_fingerprint,
            "recipe": plan.recipe.fingerprint(),
            "git": _git_commit(),
        }
        self._spec = RunSpec(
            experiment=f"tavlad/{plan.dataset_name}",
            name=plan.name,
            tags={RUN_TAG: plan.name, **tags},
            params=plan.recipe.flat() | {"split": plan.split},
        )
        self._tags = tags
        self.parent = Tracker(site.mlflow_uri, self._spec, self._folder / "parent")
        self.parent.log_dataset(plan.dataset_name, index.fingerprint, plan.dataset_uri, f"split{plan.split}")
        self._stages: dict[int, Tracker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in (*self._stages.values(), self.parent):
            if kind is not None:
                tracker.finish("FAILED")
            tracker.close(_SECONDS_FOR_DELIVERY)

    def log_epoch(self, row: dict[str, Any]) -> None:
        """One epoch's metrics in its stage's run; told twice it is logged once."""
        metrics = {name: value for name, value in row.items() if name not in ("stage", "epoch")}
        self._stage(row["stage"]).log_metrics(metrics, step=row["epoch"])

    def finish(self) -> None:
        """The training is done."""
        for tracker in (*self._stages.values(), self.parent):
            tracker.finish()

    def _stage(self, number: int) -> Tracker:
        if number not in self._stages:
            stage = self._plan.recipe.stage1 if number == 1 else self._plan.recipe.stage2
            spec = RunSpec(
                experiment=self._spec.experiment,
                name=f"stage{number}",
                tags={RUN_TAG: f"{self._plan.name}/stage{number}", **self._tags},
                params={name: getattr(stage, name) for name in stage.__dataclass_fields__},
                parent=self._spec,
            )
            self._stages[number] = Tracker(
                self._site.mlflow_uri,
                spec,
                self._folder / f"stage{number}",
                seconds_between_system_metrics=_SECONDS_BETWEEN_SYSTEM_METRICS,
            )
        return self._stages[number]


def register_finished(site: Site, recipe: Recipe, split: int, console: Console) -> RegisteredRun:
    """Register a training that is done. Raises ValueError when its last checkpoint is not there yet."""
    plan, index = plan_training(site, recipe, split)
    if plan.last_checkpoint not in plan.checkpoints(site).names():
        raise ValueError(
            f"the training {plan.name} is not done: run `tavlad train` with the same recipe and split first"
        )
    with RunRecords(site, plan, index) as records:
        return register_training(site, plan, index, records, console)


def register_training(
    site: Site, plan: TrainingPlan, index: Index, records: RunRecords, console: Console
) -> RegisteredRun:
    """Register the model of a finished training and leave its pictures and tables in its run.

    Doing it twice is the same as once.
    """
    with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
        directory = Path(folder) / "model"
        plan.checkpoints(site).fetch(plan.last_checkpoint, directory)
        scores = load_scores(directory)
        history: list[dict[str, Any]] = json.loads((directory / HISTORY).read_text(encoding="utf-8"))
        for name in (STATE, SCORES, HISTORY):
            (directory / name).unlink()
        for row in history:
            records.log_epoch(row)
        best_on_test = max(row["test/top1"] for row in history if "test/top1" in row)
        records.parent.log_metrics(scores.summary("test") | {"best_on_test/top1": best_on_test}, step=len(history))
        if plan.recipe.model.trunk != "vgg16":  # which has no activation maps
            _draw_attention(site, plan, index, directory, Path(folder) / "attention.png")
        _log_artifacts(records.parent, plan, index, scores, history, Path(folder))
        run_id = records.parent.run_id(_SECONDS_FOR_DELIVERY)
        with tempfile.TemporaryDirectory(prefix="tavlad-") as code:
            model = register(
                site.mlflow_uri,
                directory,
                run_id=run_id,
                name=f"tavlad-{plan.dataset_name}-split{plan.split}",
                tags={
                    "variant": plan.recipe.model.variant,
                    "dataset_fingerprint": plan.dataset_fingerprint,
                    "test_top5": f"{scores.top(5):.6f}",
                    "test_mean_class": f"{scores.mean_class:.6f}",
                    "training": plan.name,
                },
                accuracy=scores.top(1),
                code=stage_code(Path(code), plan.recipe.model.trunk),
            )
    records.finish()
    moved = "now best" if model.is_best else "best stays where it is"
    console.say(f"  test top-1 {scores.top(1):.1%}; registered {model.name} version {model.version} ({moved})")
    return RegisteredRun(
        plan=plan,
        model=model,
        scores=scores,
        history=history,
        best_on_test=best_on_test,
        run_url=records.parent.url(),
    )


def _draw_attention(site: Site, plan: TrainingPlan, index: Index, directory: Path, path: Path) -> None:
    """The attention of the untouched ImageNet trunk and of the trained model, on a frame of a few test clips."""
    untrained, _ = build_untrained(site, plan.recipe, len(index.actions))
    trained, card = load_model(directory)
    options = LoaderOptions(
        batch_size=_ATTENTION_CLIPS, seed=0, crop=card.crop, augment=False, shuffle=True, prefetch_batches=1
    )
    loader = ClipLoader(index, open_store(plan.dataset_uri, site.s3), plan.split, "test", options)
    middle_B1CHW = next(loader.epoch(0)).frames_BTCHW[:, card.num_frames // 2, None]
    figure = figures.attention_grid(
        middle_B1CHW[:, 0].permute(0, 2, 3, 1).numpy(),
        untrained.eval().attention(middle_B1CHW)[:, 0].numpy(),
        trained.attention(middle_B1CHW)[:, 0].numpy(),
    )
    path.write_bytes(figures.png(figure))


def _log_artifacts(
    log: Tracker, plan: TrainingPlan, index: Index, scores: Scores, history: list[dict[str, Any]], folder: Path
) -> None:
    (folder / "recipe.json").write_text(json.dumps(plan.recipe.flat(), indent=2) + "\n", encoding="utf-8")
    pictures = {
        "confusion_matrix.png": figures.confusion_matrix(scores.confusion, index.actions),
        "per_action.png": figures.per_action_bars(scores.confusion, index.actions),
        "curves.png": figures.training_curves(history),
    }
    for name, picture in pictures.items():
        (folder / name).write_bytes(figures.png(picture))
    write_table(
        folder / "confusion_matrix.parquet",
        {"action": list(index.actions)} | dict(zip(index.actions, scores.confusion.T.tolist(), strict=True)),
    )
    write_table(
        folder / "predictions.parquet",
        {
            "key": list(scores.keys),
            "label": [index.actions[label] for label in scores.labels],
            "top5": [[index.actions[label] for label in row[:5]] for row in scores.ranking],
            "scores": scores.probabilities.tolist(),
        },
    )
    for path in sorted(folder.iterdir()):
        if path.is_file():
            log.log_artifact(path)


def _git_commit() -> str:
    """The commit this code is at, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
