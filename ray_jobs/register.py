"""tavlad register: what a training leaves behind in MLflow, and its model in the registry."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.site import Site
from ray_jobs.codebook import build_untrained
from ray_jobs.console import Console
from ray_jobs.plan import TrainingPlan, plan_training
from ray_jobs.provenance import code_tags, described, label
from ray_jobs.recipe import Recipe
from ray_jobs.run_records import SECONDS_FOR_DELIVERY, RunRecords
from ray_jobs.run_report import RunReport, write_run_report
from ray_jobs.served_model import stage_code
from ray_jobs.worker import HISTORY, SCORES, load_scores
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.scratch import scratch
from shards.store import open_store
from shards.table import write_table
from tavlad import figures
from tavlad.checkpoint import STATE, load_model
from tavlad.config import NO_ACTIVATION_MAPS
from tavlad.errors import UserError
from tavlad.metrics import Scores
from tavlad.registry import Registered, register
from tavlad.tracking import Tracker

_ATTENTION_CLIPS = 6
_ATTENTION = "attention.png"


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


def register_finished(site: Site, recipe: Recipe, split: int, console: Console) -> RegisteredRun:
    """Register a training that is done. Raises ValueError when its last checkpoint is not there yet."""
    plan, index = plan_training(site, recipe, split)
    codes = plan.codes(site)
    if plan.last_checkpoint not in plan.checkpoints(site).names():
        raise UserError(
            f"the training {plan.name} is not done: run `tavlad train` with the same recipe and split first"
        )
    with RunRecords(site, plan, index, codes) as records:
        if note := label(codes):
            console.say(f"  {note}")
        return register_training(site, plan, index, records, console)


def finished_scores(site: Site, plan: TrainingPlan) -> Scores:
    """The scores of a finished training's last epoch on the test part."""
    with scratch() as folder:
        plan.checkpoints(site).fetch(plan.last_checkpoint, folder)
        return load_scores(folder)


def register_training(
    site: Site, plan: TrainingPlan, index: Index, records: RunRecords, console: Console
) -> RegisteredRun:
    """Register the model of a finished training and leave its pictures and tables in its run.

    Doing it twice is the same as once.
    """
    with scratch() as folder:
        directory = folder / "model"
        plan.checkpoints(site).fetch(plan.last_checkpoint, directory)
        scores = load_scores(directory)
        history: list[dict[str, Any]] = json.loads((directory / HISTORY).read_text(encoding="utf-8"))
        for name in (STATE, SCORES, HISTORY):
            (directory / name).unlink()
        for row in history:
            records.log_epoch(row)
        best_on_test = max(row["test/top1"] for row in history if "test/top1" in row)
        records.parent.log_metrics(scores.summary("test") | {"best_on_test/top1": best_on_test}, step=len(history))
        if plan.recipe.model.trunk not in NO_ACTIVATION_MAPS:
            _draw_attention(site, plan, index, directory, folder / _ATTENTION)
        log_results(site, plan, index, records, scores, history, folder)
        run_id = records.parent.run_id(SECONDS_FOR_DELIVERY)
        with scratch() as code:
            model = register(
                site.mlflow_uri,
                directory,
                run_id=run_id,
                name=f"tavlad-{plan.dataset_name}-split{plan.split}",
                tags={
                    "variant": plan.recipe.model.variant,
                    "dataset": plan.dataset_name,
                    "dataset_fingerprint": plan.dataset_fingerprint,
                    "split": str(plan.split),
                    "recipe": plan.recipe.fingerprint(),
                    "clips": str(len(scores.keys)),
                    "test_top5": f"{scores.top(5):.6f}",
                    "test_mean_class": f"{scores.mean_class:.6f}",
                    "training": plan.name,
                    **code_tags(records.codes),
                },
                accuracy=scores.top(1),
                code=stage_code(code, plan.recipe.model),
            )
    records.finish()
    moved = "now best" if model.is_best else "best stays where it is"
    console.say(f"  test top-1 {scores.top(1):.1%}; registered {model.name} version {model.version} ({moved})")
    console.say(f"  compare: {records.comparison_url()}")
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


def log_results(
    site: Site,
    plan: TrainingPlan,
    index: Index,
    records: RunRecords,
    scores: Scores,
    history: list[dict[str, Any]],
    folder: Path,
) -> None:
    """The report, pictures and tables of a training's scores, made in `folder` and given to its run with all else that
    is there."""
    _write_report(site, plan, index, records, scores, history, folder)
    _log_artifacts(records.parent, plan, index, scores, history, folder)


def _write_report(
    site: Site,
    plan: TrainingPlan,
    index: Index,
    records: RunRecords,
    scores: Scores,
    history: list[dict[str, Any]],
    folder: Path,
) -> None:
    """What the training came to, as a page of its own beside the pictures it is made of."""
    options = LoaderOptions(batch_size=1, seed=0, crop=plan.recipe.training.crop, augment=False, shuffle=False)
    loader = ClipLoader(index, open_store(plan.dataset_uri, site.s3), plan.split, "test", options)
    row_of = {key: row for row, key in enumerate(loader.clips.keys())}
    facts = {
        "set": f"{plan.dataset_name}, split {plan.split}, {len(index.actions)} actions",
        "variant": plan.recipe.model.variant,
        "test top-1": f"{scores.top(1):.1%}",
        "test top-5": f"{scores.top(5):.1%}",
        "mean class accuracy": f"{scores.mean_class:.1%}",
        "test clips": str(len(scores.keys)),
        "epochs": str(len(history)),
        "code": described(records.codes),
    }
    report = RunReport(
        name=plan.name,
        facts=facts,
        actions=index.actions,
        history=history,
        scores=scores,
        recipe=plan.recipe.flat() | {"split": plan.split},
        links={"compare with the other trainings of this split, in MLflow": records.comparison_url()},
        frames_of=lambda key: loader.read_clip(row_of[key], 0),
        attention_png=path.read_bytes() if (path := folder / _ATTENTION).exists() else None,
    )
    write_run_report(folder / "report.html", report)


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
