"""One trial of a sweep: stage 1 of a changed recipe by `fit`, in this process; scored on held-out clips of train.

Ranks of a process group may call it together: they share the batches, and the first one writes and reports.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from infra.site import load_site
from ray_jobs.checkpoints import BackgroundWriter
from ray_jobs.codebook import build_untrained, codebook_of, load_codebook
from ray_jobs.feature_batches import FeatureBatches, pooled_if_possible
from ray_jobs.features import Extractor, feature_set
from ray_jobs.plan import checkpoint_name, node_cache, open_set
from ray_jobs.recipe import Recipe
from ray_jobs.space import Changes
from ray_jobs.sweep import SCORE, Row, SweepPlan, SweepStore, held_out_loss, selection_score
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.scratch import scratch
from shards.store import Store
from tavlad.checkpoint import TrainState
from tavlad.model import TaVlad
from tavlad.optim import choose_trained
from tavlad.parallel import World
from tavlad.train import Batches, Diverged, EpochReport, Listeners, StagePlan, fit

_STATE = "trial.pt"
Report = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialJob:
    """What every trial of a sweep is told."""

    sweep: SweepPlan
    use_features: bool
    """Whether trials learn from stored features; those not there are computed and written."""
    rung: int | None = None
    """Epochs after which a trial ends by itself, where it waits for the others; None: it is trained to its end."""


def run_trial(job: TrialJob, changes: Changes, report: Report, device: torch.device | None = None) -> None:
    """Train the trial, from its newest checkpoint on; every epoch's row is reported, those done before too.

    Computes on `device`, by default a GPU if one is visible. A trial that is over is told again and not trained. Raises
    `Diverged` when the configuration cannot be trained with.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resources = job.sweep.training.recipe.resources
    world = World.current(device, resources.virtual_ranks if resources.reduce == "deterministic" else 0)
    site = load_site(job.sweep.training.site_name)
    known = SweepStore(site, job.sweep.name).find(job.sweep.trial_id(changes))
    if known is not None:
        for row in known.rows if world.rank == 0 else []:
            report(row)
        if known.state == "diverged":
            raise Diverged(known.reason)
        return
    trial = _Trial(job, changes, report, world)
    try:
        trial.run()
    finally:
        trial.close()


class _AtRung(Exception):
    """Every rank leaves after the same epoch."""


class _Trial:
    def __init__(self, job: TrialJob, changes: Changes, report: Report, world: World) -> None:
        self._job = job
        self._world = world
        self._training = job.sweep.training
        self._recipe: Recipe = job.sweep.trial_recipe(changes)
        self._report = report
        self._site = load_site(self._training.site_name)
        self._checkpoints = SweepStore(self._site, job.sweep.name).checkpoints(job.sweep.trial_id(changes))
        self._rows: list[Row] = []
        self._writer = BackgroundWriter()

    def close(self) -> None:
        """Every checkpoint written."""
        self._writer.close()

    def run(self) -> None:
        recipe = self._recipe
        torch.set_num_threads(max(1, int(recipe.resources.cpus_per_worker)))
        store, index = open_set(self._site, self._training.dataset_uri, recipe)
        seen = self._job.sweep.held_out(index)
        model, provenance = build_untrained(self._site, recipe, len(index.actions))
        codebook = codebook_of(self._site, recipe, self._training.split, seen, store, model, provenance)
        if codebook.uri:
            model.initialise(load_codebook(codebook.uri, self._site))
        choose_trained(model, recipe.stage1)
        resume = self._resume(model)
        for row in list(self._rows) if self._world.rank == 0 else []:
            self._report(row)
        if self._is_at_rung(len(self._rows)):
            return
        train, held = self._batches(model, provenance, index, seen, store)
        model.to(self._world.device)
        plan = StagePlan(number=1, stage=recipe.stage1, training=recipe.training)
        listeners = Listeners(on_epoch=lambda each: self._end_epoch(model, each))
        with contextlib.suppress(_AtRung):
            fit(model, plan, train, held, listeners, resume, self._world)

    def _is_at_rung(self, epochs: int) -> bool:
        return self._job.rung is not None and epochs >= self._job.rung

    def _resume(self, model: TaVlad) -> TrainState | None:
        """The state of the newest checkpoint, its weights put into the model."""
        names = self._checkpoints.names()
        if not names:
            return None
        with scratch() as folder:
            self._checkpoints.fetch(names[-1], folder)
            saved: dict[str, Any] = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["learned"], strict=False)
        self._rows = saved["rows"]
        return TrainState(stage=1, next_epoch=len(self._rows), optimizer=saved["optimizer"])

    def _batches(
        self, model: TaVlad, provenance: str, index: Index, seen: Index, store: Store
    ) -> tuple[Batches, Batches]:
        recipe, split, world = self._recipe, self._training.split, self._world
        cache = node_cache(self._site, recipe.resources.disk_cache, index)
        place = (world.parts.start, world.num_parts, cache)
        train, held = (
            ClipLoader(
                *(seen, store, split, part, trial_loading(recipe, training=part == "train"), *place),
                num_ranks=len(world.parts),
            )
            for part in ("train", "test")
        )
        if not self._job.use_features:
            return train, held
        features = feature_set(self._site, recipe, index, model, provenance, recipe.stage1.feature_kind)
        extract = Extractor(model, world.device, recipe.training.precision, features.kind)
        learned, tested = (FeatureBatches(part, features, split, extract, cache) for part in (train, held))
        # The mirror image of a clip is not among what is stored for testing.
        return pooled_if_possible(learned, model, recipe.stage1), (
            held if recipe.model.mirror_at_test else pooled_if_possible(tested, model, recipe.stage1)
        )

    def _end_epoch(self, model: TaVlad, report: EpochReport) -> None:
        """A checkpoint, written while training goes on, and the row."""
        if self._world.rank == 0:
            self._keep(model, report)
        if self._is_at_rung(report.epoch):
            raise _AtRung

    def _keep(self, model: TaVlad, report: EpochReport) -> None:
        assert report.scores is not None, "trials are scored after every epoch"
        metrics = {name: value for name, value in report.metrics.items() if not name.startswith("test/")}
        metrics |= report.scores.summary("held_out")
        metrics |= {"held_out/loss": held_out_loss(report.scores), SCORE: selection_score(report.scores)}
        self._rows.append({"epoch": report.epoch, **metrics})
        # What stage 1 does not train is as the recipe and the codebook give it.
        learned = {
            name: tensor.detach().cpu().clone() for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        values = {"learned": learned, "optimizer": copy.deepcopy(report.state.optimizer), "rows": list(self._rows)}
        self._writer.submit(lambda: self._write(checkpoint_name(1, report.epoch), values))
        if self._is_at_rung(report.epoch) or report.epoch == report.num_epochs:  # the process may end with this row
            self._writer.wait()
        self._report(self._rows[-1])

    def _write(self, name: str, values: dict[str, Any]) -> None:
        with scratch() as folder:
            torch.save(values, folder / _STATE)
            self._checkpoints.save(name, folder)


def trial_loading(recipe: Recipe, *, training: bool) -> LoaderOptions:
    """How a trial reads the part it learns from, or the held-out part."""
    return LoaderOptions(
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        crop=recipe.training.crop,
        augment=training and recipe.training.augment,
        views=recipe.training.views,
        num_views=recipe.training.num_views,
        shuffle=training,
        num_threads=recipe.resources.unmeasured_threads,
        prefetch_batches=recipe.resources.prefetch_batches,
    )
