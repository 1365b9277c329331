"""What each worker of a training does: its share of `tavlad.train.fit`, from the newest checkpoint on."""

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch

from infra.site import Site, load_site
from ray_jobs.codebook import build_untrained, load_codebook
from ray_jobs.monitor import EpochDone, Monitor, Started, Stepped, UserError
from ray_jobs.plan import TrainingPlan, checkpoint_name, node_cache
from shards.index import Index, load_index
from shards.read import ClipLoader, LoaderOptions
from shards.store import Store, open_store
from tavlad.checkpoint import ModelCard, TrainState, load_state, load_weights_into, save_checkpoint
from tavlad.metrics import Scores
from tavlad.model import TaVlad
from tavlad.parallel import World
from tavlad.train import EpochReport, Listeners, StagePlan, fit

HISTORY = "history.json"
SCORES = "scores.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """All a worker is told."""

    plan: TrainingPlan
    codebook_uri: str
    card: ModelCard
    monitor: Monitor


def train_worker(config: WorkerConfig) -> None:
    """The training function of one rank. What the user must mend is told to the driver and ends the training."""
    if config.monitor.error() is not None:  # started again after an error that a restart cannot mend
        return
    try:
        _Trainer(config).run()
    except ValueError as error:
        config.monitor.tell_surely(UserError(text=str(error)))
        raise


class _Trainer:
    """One rank's training of one plan."""

    def __init__(self, config: WorkerConfig) -> None:
        self._plan = config.plan
        self._recipe = config.plan.recipe
        self._card = config.card
        self._monitor = config.monitor
        self._site: Site = load_site(config.plan.site_name)
        self._checkpoints = config.plan.checkpoints(self._site)
        self._world = World.current(ray.train.torch.get_device())
        self._codebook_uri = config.codebook_uri
        self._history: list[dict[str, Any]] = []

    def run(self) -> None:
        """Both stages, or what is left of them."""
        store = open_store(self._plan.dataset_uri, self._site.s3)
        index = load_index(store)
        model, resume = self._model(index)
        train = self._loader(index, store, training=True)
        test = self._loader(index, store, training=False)
        for number, stage in self._plan.stages:
            if resume is not None and number < resume.stage:
                continue
            plan = StagePlan(number=number, stage=stage, training=self._recipe.training)
            listeners = Listeners(
                on_epoch=lambda report: self._end_epoch(model, report),
                on_step=lambda done, total, number=number: self._end_step(number, done, total),
            )
            state = resume if resume is not None and resume.stage == number else None
            fit(model, plan, train, test, listeners, state, self._world)

    def _model(self, index: Index) -> tuple[TaVlad, TrainState | None]:
        """The model as the newest checkpoint has it, or as training begins."""
        model, _ = build_untrained(self._site, self._recipe, len(index.actions))
        model.vlad.initialise(load_codebook(self._codebook_uri, self._site), self._recipe.model.alpha)
        names = self._checkpoints.names()
        resume = None
        if names:
            with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
                directory = Path(folder)
                self._checkpoints.fetch(names[-1], directory)
                load_weights_into(model, directory)
                resume = load_state(directory)
                self._history = json.loads((directory / HISTORY).read_text(encoding="utf-8"))
        if self._world.rank == 0:
            self._monitor.tell(Started(resumed_from=names[-1] if names else None, history=self._history))
        return model.to(self._world.device), resume

    def _loader(self, index: Index, store: Store, *, training: bool) -> ClipLoader:
        settings, resources, world = self._recipe.training, self._recipe.resources, self._world
        options = LoaderOptions(
            batch_size=settings.batch_size,
            seed=settings.seed,
            crop=settings.crop,
            augment=training and settings.augment,
            views=settings.views,
            shuffle=training,
            num_threads=resources.loader_threads,
            prefetch_batches=resources.prefetch_batches,
            pin_memory=self._world.device.type == "cuda",
        )
        part = "train" if training else "test"
        cache = node_cache(self._site, resources.disk_cache, index)
        return ClipLoader(index, store, self._plan.split, part, options, world.rank, world.size, cache)

    def _end_step(self, stage: int, done: int, total: int) -> None:
        if self._world.rank == 0:
            self._monitor.tell(Stepped(stage=stage, done=done, total=total))

    def _end_epoch(self, model: TaVlad, report: EpochReport) -> None:
        """A checkpoint, then the news: what the driver hears of is safe."""
        if self._world.rank == 0:
            row: dict[str, Any] = {"stage": report.stage, "epoch": report.epoch, **report.metrics}
            self._history.append(row)
            with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
                directory = Path(folder) / checkpoint_name(report.stage, report.epoch)
                save_checkpoint(directory, model, self._card, report.state)
                (directory / HISTORY).write_text(json.dumps(self._history, indent=1), encoding="utf-8")
                if report.scores is not None:
                    (directory / SCORES).write_bytes(_scores_to_bytes(report.scores))
                self._checkpoints.save(directory.name, directory)
            self._monitor.tell_surely(EpochDone(row=row))
        ray.train.report(dict(report.metrics))


def _scores_to_bytes(scores: Scores) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, keys=np.array(scores.keys), labels=scores.labels, probabilities=scores.probabilities)
    return buffer.getvalue()


def load_scores(path: Path) -> Scores:
    """The scores that a checkpoint directory holds."""
    with np.load(path / SCORES, allow_pickle=False) as values:
        return Scores(
            keys=tuple(values["keys"].tolist()), labels=values["labels"], probabilities=values["probabilities"]
        )
