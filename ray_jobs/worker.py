"""What each worker of a training does: its share of `tavlad.train.fit`, from the newest checkpoint on."""

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch

from infra.site import Site, load_site
from ray_jobs.checkpoints import BackgroundWriter
from ray_jobs.cluster import lack_of_memory
from ray_jobs.codebook import build_untrained, load_codebook
from ray_jobs.feature_batches import FeatureBatches, pooled_if_possible
from ray_jobs.features import Extractor, decide_once, feature_set, may_use_features
from ray_jobs.loading import Loading, choose_loading, cores_of_a_rank, measure_loading, memory_of
from ray_jobs.monitor import EpochDone, Leaving, Monitor, Said, Started, Stepped, Stopped
from ray_jobs.notice import STOP, Left, Notice
from ray_jobs.plan import TrainingPlan, checkpoint_name, node_cache, open_set
from ray_jobs.provenance import digest_of_sources
from ray_jobs.sampling import Sampler
from shards.features import FeatureSet
from shards.index import Index
from shards.patience import outlast
from shards.read import ClipLoader, LoaderOptions
from shards.scratch import scratch
from shards.store import Store, StoreUnreachable
from tavlad.checkpoint import ModelCard, TrainState, load_state, load_weights_into, weights_of, write_checkpoint
from tavlad.errors import UserError
from tavlad.metrics import Scores
from tavlad.model import TaVlad
from tavlad.parallel import World
from tavlad.train import Batches, EpochReport, Listeners, StagePlan, fit

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
    trainer = _Trainer(config)
    try:
        trainer.run()
    except (MemoryError, RuntimeError) as error:
        if (text := lack_of_memory(error)) is None:
            raise
        users = UserError(text)
        config.monitor.tell_surely(Stopped(error=users))
        raise users from error
    except StoreUnreachable:  # later it may answer
        raise
    except UserError as error:
        config.monitor.tell_surely(Stopped(error=error))
        raise
    finally:
        trainer.close()


class _Trainer:
    """One rank's training of one plan."""

    def __init__(self, config: WorkerConfig) -> None:
        self._plan = config.plan
        self._recipe = config.plan.recipe
        self._card = config.card
        self._monitor = config.monitor
        self._site: Site = load_site(config.plan.site_name)
        self._checkpoints = config.plan.checkpoints(self._site)
        resources = config.plan.recipe.resources
        virtual_ranks = resources.virtual_ranks if resources.reduce == "deterministic" else 0
        self._world = World.current(ray.train.torch.get_device(), virtual_ranks)
        if virtual_ranks and self._world.device.type == "cuda":
            torch.use_deterministic_algorithms(True, warn_only=True)  # some operators on GPUs have no such kind
        self._notice = Notice(self._world, config.monitor.is_stopping)
        self._leaving: str | None = None
        self._last_checkpoint = config.plan.last_checkpoint
        self._codebook_uri = config.codebook_uri
        self._history: list[dict[str, Any]] = []
        self._writer = BackgroundWriter()
        self._sampler: Sampler | None = None

    def close(self) -> None:
        """Every checkpoint written, every sample told."""
        self._writer.close()
        if self._sampler is not None:
            self._sampler.close()

    def run(self) -> None:
        """Both stages, or what is left of them."""
        self._require_code_of_driver()
        store, index = outlast(lambda: open_set(self._site, self._plan.dataset_uri, self._recipe))
        newest = self._newest_checkpoint()
        model, resume = outlast(lambda: self._model(index, newest))
        self._tell_of_start(newest)
        loading = self._loading(model, index, store)
        train = self._loader(index, store, loading, training=True)
        test = self._loader(index, store, loading, training=False)
        stages = [each for each in self._plan.stages if resume is None or each[0] >= resume.stage]
        context = ray.train.get_context()
        if context.get_local_rank() == 0:
            self._sampler = Sampler(self._monitor, context.get_node_rank(), stages[0][0])
        # All decided before anything long begins: what does not fit is refused now.
        batches = {number: self._batches(model, index, number, train, test) for number, _ in stages}
        for number, stage in stages:
            if self._sampler is not None:
                self._sampler.stage = number
            plan = StagePlan(number=number, stage=stage, training=self._recipe.training)
            listeners = Listeners(
                on_epoch=lambda report: self._end_epoch(model, report),
                on_step=lambda done, total, number=number: self._end_step(number, done, total),
                wants_state=self._wants_state,
                on_state=lambda state: self._keep_state(model, state),
            )
            state = resume if resume is not None and resume.stage == number else None
            # Frames, whatever it learned from: features are kept in the precision of training.
            is_result = number == stages[-1][0] and plan.training.scoring_precision != plan.training.precision
            scored = test if is_result else None
            fit(model, plan, *batches[number], listeners, state, self._world, scored=scored)

    def _require_code_of_driver(self) -> None:
        """What is trained says by which code: a rank that has other code may not join in."""
        told, here = self._card.provenance["code"][-1]["sources"], digest_of_sources()
        if told != here:
            raise UserError(
                f"a worker has other code than the driver (sources {here[:10]}, not {told[:10]}): it was edited "
                "meanwhile, or the image of its node is another; let all have the same and start the training again"
            )

    def _batches(
        self, model: TaVlad, index: Index, number: Literal[1, 2], train: ClipLoader, test: ClipLoader
    ) -> tuple[Batches, Batches]:
        """What a stage learns from and is tested on: frames, or features in their place."""
        features = self._features(model, index, number, train, test)
        if features is None:
            return train, test
        extract, split, stage = self._extractor(model, features), self._plan.split, dict(self._plan.stages)[number]
        cache = node_cache(self._site, self._recipe.resources.disk_cache, index)
        learned, tested = (FeatureBatches(part, features, split, extract, cache) for part in (train, test))
        # The mirror image of a clip is not among what is stored for testing.
        return pooled_if_possible(learned, model, stage), (
            test if self._recipe.model.mirror_at_test else pooled_if_possible(tested, model, stage)
        )

    def _extractor(self, model: TaVlad, features: FeatureSet) -> Extractor:
        return Extractor(model, self._world.device, self._recipe.training.precision, features.kind)

    def _features(
        self, model: TaVlad, index: Index, number: Literal[1, 2], train: ClipLoader, test: ClipLoader
    ) -> FeatureSet | None:
        """The feature set that a stage learns from; None if it learns from frames. Decided once for a training."""
        recipe, stage = self._recipe, dict(self._plan.stages)[number]
        if not may_use_features(recipe, stage, model):
            return None
        weights = str(self._card.provenance["trunk_weights"])
        features = feature_set(self._site, recipe, index, model, weights, stage.feature_kind)
        use = None
        if self._world.rank == 0:
            extract = self._extractor(model, features)
            use = decide_once(self._site, self._plan, number, features, extract, train, test)
            self._monitor.tell(Said(text=f"stage {number} learns {use.reason}"))
        (use, *_) = self._world.gather(use)
        assert use is not None
        return features if use.use_features else None

    def _newest_checkpoint(self) -> str | None:
        """One rank looks for all: another that looks a moment later might see another one."""
        names = outlast(self._checkpoints.names) if self._world.rank == 0 else []
        (newest, *_) = self._world.gather(names[-1] if names else None)
        return newest

    def _model(self, index: Index, newest: str | None) -> tuple[TaVlad, TrainState | None]:
        """The model as the newest checkpoint has it, or as training begins."""
        model, _ = build_untrained(self._site, self._recipe, len(index.actions))
        if model.vlad is not None:
            model.initialise(load_codebook(self._codebook_uri, self._site))
        resume = None
        if newest is not None:
            with scratch() as directory:
                self._checkpoints.fetch(newest, directory)
                load_weights_into(model, directory)
                resume = load_state(directory)
                self._history = json.loads((directory / HISTORY).read_text(encoding="utf-8"))
        return model.to(self._world.device), resume

    def _tell_of_start(self, newest: str | None) -> None:
        if self._world.rank == 0:
            self._monitor.tell(Started(resumed_from=newest, history=self._history, num_workers=self._world.size))

    def _loading(self, model: TaVlad, index: Index, store: Store) -> Loading:
        """How this rank reads clips; changes nothing but the time."""
        resources, world, settings = self._recipe.resources, self._world, self._recipe.training
        as_told = Loading(threads=resources.unmeasured_threads, train="cpu", test="cpu", reason="")
        probe = self._loader(index, store, as_told, training=False)
        rates = measure_loading(
            model, probe, world.device, settings.precision, max(1, settings.batch_size // world.size)
        )
        cores = cores_of_a_rank(ray.train.get_context().get_local_world_size())
        memory = memory_of(world.device, resources.gpus_per_worker, index, self._plan.split)
        loading = choose_loading(resources, rates, cores, memory, nvjpeg=settings.decoder == "nvjpeg")
        if world.rank == 0:
            self._monitor.tell(Said(text=loading.reason))
        return loading

    def _loader(self, index: Index, store: Store, loading: Loading, *, training: bool) -> ClipLoader:
        settings, resources, world = self._recipe.training, self._recipe.resources, self._world
        decoder = loading.train if training else loading.test
        options = LoaderOptions(
            batch_size=settings.batch_size,
            seed=settings.seed,
            crop=settings.crop,
            augment=training and settings.augment,
            views=settings.views,
            num_views=settings.num_views,
            shuffle=training,
            num_threads=loading.threads,
            prefetch_batches=resources.prefetch_batches,
            pin_memory=self._world.device.type == "cuda",
            gpu=None if decoder == "cpu" else self._world.device,
            keep_decoded=decoder == "once",
        )
        part = "train" if training else "test"
        cache = node_cache(self._site, resources.disk_cache, index)
        parts = world.parts
        return ClipLoader(
            index, store, self._plan.split, part, options, parts.start, world.num_parts, cache, num_ranks=len(parts)
        )

    def _end_step(self, stage: int, done: int, total: int) -> None:
        if self._world.rank == 0:
            self._monitor.tell(Stepped(stage=stage, done=done, total=total))

    def _wants_state(self, done: int) -> bool:
        every = self._recipe.resources.checkpoint_steps
        self._leaving = self._notice.heard()
        return self._leaving is not None or (every > 0 and done % every == 0)

    def _keep_state(self, model: TaVlad, state: TrainState) -> None:
        """A checkpoint within an epoch."""
        name = checkpoint_name(state.stage, state.next_epoch, state.next_step)
        if self._world.rank == 0:
            self._write(name, model, state, None, lambda: None)
        self._leave_if_told(name)

    def _leave_if_told(self, name: str) -> None:
        """End once the checkpoint is whole, all ranks together: the first that ends takes the others along."""
        if self._leaving is None:
            return
        if self._world.rank == 0:
            self._writer.wait()
            then = "" if self._leaving == STOP else ", starting again"
            self._monitor.tell_surely(Leaving(text=f"{self._leaving}: saved {name}{then}"))
        self._world.sum(torch.zeros(1))
        raise Left(self._leaving)

    def _end_epoch(self, model: TaVlad, report: EpochReport) -> None:
        """A checkpoint, then the news: what the driver hears of is safe."""
        name = checkpoint_name(report.stage, report.epoch)
        if self._world.rank == 0:
            row: dict[str, Any] = {"stage": report.stage, "epoch": report.epoch, **report.metrics}
            self._history.append(row)
            self._write(name, model, report.state, report.scores, lambda: self._monitor.tell_surely(EpochDone(row=row)))
            if report.epoch == report.num_epochs:
                self._writer.wait()
        ray.train.report(dict(report.metrics))
        if name != self._last_checkpoint:
            self._leaving = self._notice.heard()
            self._leave_if_told(name)

    def _write(
        self, name: str, model: TaVlad, state: TrainState, scores: Scores | None, on_written: Callable[[], None]
    ) -> None:
        """Copy what the next step changes; write it while training goes on."""
        weights, state, history = weights_of(model), copy.deepcopy(state), json.dumps(self._history, indent=1)

        def write() -> None:
            with scratch() as folder:
                directory = folder / name
                write_checkpoint(directory, weights, self._card, state)
                (directory / HISTORY).write_text(history, encoding="utf-8")
                if scores is not None:
                    (directory / SCORES).write_bytes(_scores_to_bytes(scores))
                outlast(lambda: self._checkpoints.save(name, directory), told=self._tell_of_waiting)
            on_written()

        self._writer.submit(write)

    def _tell_of_waiting(self, note: str) -> None:
        self._monitor.tell(Said(text=note or "the store answers again"))


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
