"""tavlad reproduce: the paper's tables with our numbers beside them. What is done is found, what is missing is run.

A training is done once its outcome lies beside its checkpoints; its name is a fingerprint of all that decides it. So a
second run does no work, and an interrupted one goes on where it was.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.site import Site
from ray_jobs.console import Console
from ray_jobs.monitor import GivenUp
from ray_jobs.plan import TrainingPlan, locate_set, plan_run, plan_training
from ray_jobs.provenance import OtherCode, described, label
from ray_jobs.published import PublishedRow, published_table
from ray_jobs.recipe import Recipe, change_recipe, load_recipe
from ray_jobs.register import RegisteredRun, finished_scores
from ray_jobs.reproduce_report import Entry, Outcome, Reproduction, write_reproduction
from ray_jobs.tdd import TddRun, run_tdd
from ray_jobs.train import train
from shards.index import INDEX_PATH
from shards.store import open_store
from tavlad.config import StageConfig
from tavlad.errors import UserError
from tavlad.metrics import fuse

_OUTCOME = "outcome.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceOptions:
    """What to reproduce, and how much of it."""

    table: Literal[1, 2]
    rows: tuple[str, ...] = ()
    """Names of recipes; none means every row that has one."""
    subset: float = 1.0
    """Share of the clips, for rehearsals."""
    epochs_scale: float = 1.0
    """What epochs are multiplied by, for rehearsals."""
    other_code: OtherCode = "refuse"
    """What to do with what other code began."""
    changes: tuple[str, ...] = ()
    """Changes of every recipe, such as "training.batch_size=16", or of one, "ta-vlad:training.batch_size=16"."""

    def __post_init__(self) -> None:
        if not 0 < self.subset <= 1:
            raise UserError(f"--subset {self.subset}: must be above 0 and at most 1")
        if self.epochs_scale <= 0:
            raise UserError(f"--epochs-scale {self.epochs_scale}: must be above 0")
        known = [row.recipe for row in published_table(self.table) if row.recipe is not None]
        for flag, rows in (("--rows", self.rows), ("--set", [row for row, _ in map(_addressed, self.changes) if row])):
            for row in rows:
                if row not in known:
                    raise UserError(f"{flag} {row}: table {self.table} has the rows {', '.join(known)}")

    def changes_of(self, recipe: str) -> list[str]:
        """Those of every recipe, and after them its own."""
        addressed = [_addressed(change) for change in self.changes]
        return [change for whose in ("", recipe) for row, change in addressed if row == whose]


def _addressed(change: str) -> tuple[str, str]:
    """The recipe that a change is for, "" for all of them; and the change."""
    recipe, colon, rest = change.partition(":")
    return (recipe, rest) if colon and "=" not in recipe else ("", change)


def reproduce(
    site: Site, datasets: list[str], options: ReproduceOptions, folder: Path, console: Console
) -> dict[str, Any]:
    """Run what is missing of a table and write report.html and report.json into `folder`, anew after every training.

    A training that cannot be done is named in the report with its reason, and the others go on; an error at the end.
    """
    entries = [
        Entry(row=row, dataset=dataset, split=split)
        for dataset in datasets
        for row in _rows(site, dataset, options)
        for split in ((1,) if options.table == 1 else (1, 2, 3))
    ]
    started, kind = time.monotonic(), UserError
    for number, entry in enumerate(entries):
        console.heading(f"[{number + 1}/{len(entries)}] {entry.row.name}: {entry.dataset}, split {entry.split}")
        try:
            outcome: Outcome | None = (
                _fused(site, entry, options) if entry.row.fuses else _outcome(site, entry, options, console)
            )
            failure = ""
        except (UserError, GivenUp) as error:
            console.say(f"  not done: {error}")
            outcome, failure = None, str(error).partition("\n")[0]  # the rest is a traceback
            kind = type(error) if isinstance(error, GivenUp) else kind
        entries[number] = dataclasses.replace(entry, outcome=outcome, failure=failure)
        write_reproduction(folder, _described(options, entries, datasets, site))
    seconds = time.monotonic() - started
    document = write_reproduction(folder, _described(options, entries, datasets, site))
    _show(entries, console)
    console.say(f"Report: {folder / 'report.html'} ({seconds:.0f} s)")
    failures = [
        f"{entry.row.recipe or entry.row.name} on {entry.dataset}, split {entry.split}"
        for entry in entries
        if entry.failure
    ]
    if failures:
        raise kind(f"not reproduced: {'; '.join(failures)}; the report gives the reasons: {folder}/report.html")
    return document


def _rows(site: Site, dataset: str, options: ReproduceOptions) -> list[PublishedRow]:
    """The rows that can be run on a set: those of motion where its motion is packed, fused ones where all parts are."""
    rows: list[PublishedRow] = []
    for row in published_table(options.table):
        chosen = {each.recipe for each in rows}
        if row.recipe is None:
            if row.fuses and chosen.issuperset(row.fuses):
                rows.append(row)
        elif row.recipe in options.rows or (not options.rows and _is_packed(site, dataset, row)):
            rows.append(row)
    return rows


def _is_packed(site: Site, dataset: str, row: PublishedRow) -> bool:
    if row.modality == "rgb":
        return True  # or it is told what to do
    return open_store(locate_set(site, f"{dataset}-{row.modality}"), site.s3).exists(INDEX_PATH)


def _described(options: ReproduceOptions, entries: list[Entry], datasets: list[str], site: Site) -> Reproduction:
    words: list[str] = []
    if options.subset < 1:
        words.append(f"{options.subset:.0%} of the clips, for training and for testing alike")
    if options.epochs_scale != 1:
        words.append(f"epochs multiplied by {options.epochs_scale:g}")
    # Resources change who computes, not what.
    words += [
        f"{change} in {row or 'every recipe'}"
        for row, change in map(_addressed, options.changes)
        if not change.startswith("resources.")
    ]
    return Reproduction(
        table=options.table,
        datasets=datasets,
        entries=entries,
        departures=words,
        tracking_uri=site.mlflow_uri,
    )


def _outcome(site: Site, entry: Entry, options: ReproduceOptions, console: Console) -> Outcome:
    """The outcome that is there, else that of the training."""
    assert entry.row.recipe is not None
    recipe = _recipe(entry.row.recipe, entry.trained_on, options)
    plan, _ = plan_run(site, recipe, entry.split, options.other_code)
    store = open_store(plan.uri, site.s3)
    if store.exists(_OUTCOME):
        codes = plan.codes(site)
        console.say(f"  done already: {plan.name}")
        if note := label(codes):
            console.say(f"  {note}")
        return Outcome(**json.loads(store.read(_OUTCOME)) | {"code": described(codes)})
    started = time.monotonic()
    if recipe.model.temporal == "tdd":
        run, model = run_tdd(site, recipe, entry.split, console, options.other_code), ""
    else:
        run = train(site, recipe, entry.split, console, other_code=options.other_code)
        assert run is not None, "training registers"
        model = f"{run.model.name} v{run.model.version}"
    outcome = _summary(run, model, time.monotonic() - started, described(run.plan.codes(site)))
    store.write(_OUTCOME, json.dumps(dataclasses.asdict(outcome), indent=1).encode())
    return outcome


def _fused(site: Site, entry: Entry, options: ReproduceOptions) -> Outcome:
    """What the row's trainings say together; they stand before it in the table, and so are done."""
    started = time.monotonic()
    rows = {row.recipe: row for row in published_table(options.table)}
    plans: list[TrainingPlan] = []
    for name in entry.row.fuses:
        part = dataclasses.replace(entry, row=rows[name])
        plan, _ = plan_training(site, _recipe(name, part.trained_on, options), entry.split, options.other_code)
        if plan.last_checkpoint not in plan.checkpoints(site).names():
            raise UserError(f"{name}, which it fuses, is not done")
        plans.append(plan)
    scores = fuse([finished_scores(site, plan) for plan in plans])
    return Outcome(
        training=" + ".join(plan.name for plan in plans),
        top1=scores.top(1),
        mean_class=scores.mean_class,
        best_on_test=None,
        num_test_clips=len(scores.keys),
        epochs=0,
        wall_seconds=round(time.monotonic() - started, 1),
        model="",
        run_url="",
        history=[],
    )


def _recipe(name: str, dataset: str, options: ReproduceOptions) -> Recipe:
    return _scaled(load_recipe(name, options.changes_of(name), dataset), options)


def _scaled(recipe: Recipe, options: ReproduceOptions) -> Recipe:
    changes: dict[str, dict[str, Any]] = {}
    if options.subset < 1:
        changes["training"] = {"subset": options.subset}
    if options.epochs_scale != 1:
        changes |= {name: _fewer(stage, options.epochs_scale) for name, stage in _stages(recipe)}
    return change_recipe(recipe, changes) if changes else recipe


def _stages(recipe: Recipe) -> list[tuple[str, StageConfig]]:
    return [("stage1", recipe.stage1), ("stage2", recipe.stage2)]


def _fewer(stage: StageConfig, scale: float) -> dict[str, Any]:
    """The whole schedule in proportion, decay included; a stage that was there keeps an epoch."""
    if not stage.epochs:
        return {}
    return {"epochs": max(1, round(scale * stage.epochs)), "decay_every": max(1, round(scale * stage.decay_every))}


def _summary(run: RegisteredRun | TddRun, model: str, wall_seconds: float, code: str) -> Outcome:
    history = [] if isinstance(run, TddRun) else run.history
    return Outcome(
        training=run.plan.name,
        top1=run.scores.top(1),
        mean_class=run.scores.mean_class,
        best_on_test=None if isinstance(run, TddRun) else run.best_on_test,
        num_test_clips=len(run.scores.keys),
        epochs=len(history),
        wall_seconds=round(wall_seconds, 1),
        model=model,
        run_url=run.run_url,
        history=history,
        code=code,
    )


def _show(entries: list[Entry], console: Console) -> None:
    rows = [
        [
            entry.row.name,
            entry.dataset,
            str(entry.split),
            entry.failure or ("" if entry.outcome is None else f"{entry.outcome.top1:.1%}"),
            "" if entry.paper is None else f"{entry.paper:.1f}%",
        ]
        for entry in entries
    ]
    console.table(["row", "set", "split", "ours, last epoch", "paper"], rows)
