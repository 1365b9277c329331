"""tavlad train: both stages under Ray Train, resumed from the newest checkpoint, then evaluated and registered.

`ray job submit --working-dir . -- python -m ray_jobs.train RECIPE --split K` does the same on any cluster.
"""

import sys

if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["train", *sys.argv[1:]])
    sys.exit()

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import ray.train
import ray.train.torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError

from infra.site import Site
from ray_jobs.cluster import NODE_OUT_OF_MEMORY, connect, placement_groups, release, require_room
from ray_jobs.codebook import make_codebook
from ray_jobs.console import Advance, Console
from ray_jobs.interrupts import SECONDS_TO_LEAVE, asked_to_stop
from ray_jobs.monitor import EpochDone, Leaving, Lost, Monitor, News, Said, Sampled, Started, Stepped, Stopped
from ray_jobs.network import HostNetwork
from ray_jobs.notice import ListenForSigterm
from ray_jobs.plan import TrainingPlan, plan_training
from ray_jobs.provenance import Codes, OtherCode, label, recorded, with_this_code
from ray_jobs.recipe import Recipe
from ray_jobs.register import RegisteredRun, register_training
from ray_jobs.restarts import Restarts, cause_of, lacked_memory
from ray_jobs.run_records import RunRecords
from ray_jobs.worker import WorkerConfig, train_worker
from shards.index import Index
from shards.store import arrow_filesystem
from tavlad.checkpoint import ModelCard
from tavlad.errors import UserError

_SECONDS_BETWEEN_LOOKS = 0.5


def train(
    site: Site,
    recipe: Recipe,
    split: int,
    console: Console,
    *,
    register: bool = True,
    other_code: OtherCode = "refuse",
) -> RegisteredRun | None:
    """Train the recipe on one split, to a registered model unless `register` is off.

    Started again it goes on from the newest checkpoint; when all is done already it only says so, and whether other
    code did it. What other code began and did not end is refused unless `other_code` says what to do.
    """
    plan, index = plan_training(site, recipe, split, other_code)
    is_done, codes = plan.last_checkpoint in plan.checkpoints(site).names(), plan.codes(site)
    codes = codes if is_done else with_this_code(plan.name, codes, other_code)
    connect(site, console.say)
    require_room(site, recipe.resources.asked(recipe.resources.fewest_workers))
    console.heading(f"Training {plan.name}")
    with RunRecords(site, plan, index, codes) as records:
        if is_done:
            console.say("  trained already: its last checkpoint is whole")
            if note := label(codes):
                console.say(f"  {note}")
        else:
            _train(site, plan, index, codes, records, console)
        if register:
            return register_training(site, plan, index, records, console)
        records.finish()
        return None


def _train(site: Site, plan: TrainingPlan, index: Index, codes: Codes, records: RunRecords, console: Console) -> None:
    codebook = make_codebook(site, plan.recipe, plan.split, console)
    precision = plan.recipe.training.scoring_precision
    assert precision != "auto", "load_recipe decides"
    card = ModelCard(
        model=plan.recipe.model,
        actions=index.actions,
        num_frames=index.num_frames,
        short_side=int(cast(int, index.packing["short_side"])),
        crop=plan.recipe.training.crop,
        precision=precision,
        provenance={
            "run": plan.name,
            "dataset": plan.dataset_name,
            "dataset_fingerprint": plan.dataset_fingerprint,
            "split": plan.split,
            "jpeg_quality": int(cast(int, index.packing["jpeg_quality"])),
            "trunk_weights": codebook.trunk_weights,
            "codebook": codebook.uri.rpartition("/")[2],
            "code": recorded(codes),
        },
    )
    monitor = Monitor.start()
    config = WorkerConfig(plan=plan, codebook_uri=codebook.uri, card=card, monitor=monitor)
    follower = _Follower(plan, records, console)
    with asked_to_stop() as asked:
        training = _in_background(lambda: _fit(site, plan, config))
        follower.follow(monitor, training, asked)
    error = monitor.error()
    monitor.stop()
    if error is not None:
        raise error
    training.result()


def _in_background(work: Callable[[], None]) -> "Future[None]":
    """Ray Train's fit blocks: it runs in a thread while the main one shows what happens, and hears of Ctrl-C."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001  handed on
            done.set_exception(error)

    # Of a daemon's kind, or the process would wait for a training that is stopped.
    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return done


def _fit(site: Site, plan: TrainingPlan, config: WorkerConfig) -> None:
    """Ray Train's fit, again where Ray gives up: its controller died, or a worker at a moment it has no word for."""
    while True:
        try:
            _trainer(site, plan, config).fit()
        except (RayActorError, OutOfMemoryError, ControllerError) as error:
            if lacked_memory(error):
                raise UserError(NODE_OUT_OF_MEMORY) from error
            seconds = config.monitor.lost(cause_of(error), plan)
            if seconds is None:
                raise
            for group in placement_groups():  # of a controller that died while its workers started; Ray would keep it
                release(group)
            time.sleep(seconds)
        else:
            return


def _trainer(site: Site, plan: TrainingPlan, config: WorkerConfig) -> ray.train.torch.TorchTrainer:
    resources = plan.recipe.resources
    filesystem, path = arrow_filesystem(f"{plan.uri}/ray", site.s3)
    # Ray's signature knows only the kind of callback that hears of reports and errors; it takes every kind.
    callbacks: list[Any] = [Restarts(config.monitor, plan), ListenForSigterm()]
    return ray.train.torch.TorchTrainer(
        lambda: train_worker(config),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.fewest_workers
            if resources.fewest_workers == resources.most_workers
            else (resources.fewest_workers, resources.most_workers),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.asked(),
            placement_strategy=resources.placement,
            elastic_resize_monitor_interval_s=resources.resize_seconds,
        ),
        torch_config=HostNetwork(),
        run_config=ray.train.RunConfig(
            name=plan.name,
            storage_path=path,
            storage_filesystem=filesystem,
            # Ray counts all its life long; `Restarts` counts since the last checkpoint, and tells why.
            failure_config=ray.train.FailureConfig(max_failures=-1),
            callbacks=callbacks,
        ),
    )


class _Follower:
    """Shows and records what the workers tell."""

    def __init__(self, plan: TrainingPlan, records: RunRecords, console: Console) -> None:
        self._plan = plan
        self._records = records
        self._console = console
        self._note = ""
        self._began = time.monotonic()
        self._lost_at: float | None = None
        self._last_step = (0, 0)
        self._is_training = False
        self._stopping_since: float | None = None

    def follow(self, monitor: Monitor, training: "Future[Any]", asked: threading.Event) -> None:
        """Until the training ends and all its news is read. KeyboardInterrupt once it is `asked` to stop and has."""
        done = threading.Event()
        training.add_done_callback(lambda _: done.set())
        bars: dict[int, tuple[Any, Advance]] = {}
        try:
            while True:
                is_last_look = done.wait(_SECONDS_BETWEEN_LOOKS)
                for news in monitor.read():
                    self._take(news, bars)
                if asked.is_set():
                    self._stop(monitor, is_over=is_last_look)
                if is_last_look:
                    return
        finally:
            for bar, _ in bars.values():
                bar.__exit__(None, None, None)

    def _stop(self, monitor: Monitor, *, is_over: bool) -> None:
        """Wait for the workers' checkpoint, if they have done a step, then raise KeyboardInterrupt."""
        if self._stopping_since is None and self._is_training and not is_over:
            self._stopping_since = time.monotonic()
            monitor.ask_to_stop()
            self._console.say("  stopping after this step, with a checkpoint; once more ends it at once")
        elif self._stopping_since is None or is_over:
            raise KeyboardInterrupt
        elif time.monotonic() - self._stopping_since > SECONDS_TO_LEAVE:
            self._console.say(f"  no checkpoint within {SECONDS_TO_LEAVE:.0f} s: the newest one stays")
            raise KeyboardInterrupt

    def _take(self, news: News, bars: dict[int, tuple[Any, Advance]]) -> None:
        match news:
            case Started(resumed_from=resumed_from, history=history, num_workers=num_workers):
                if resumed_from is not None:
                    self._console.say(f"  going on from checkpoint {resumed_from} with {num_workers} workers")
                else:
                    precision = self._plan.recipe.training.precision
                    self._console.say(f"  beginning with {num_workers} workers, in {precision}")
                for row in history:
                    self._records.log_epoch(row)
            case Said(text=text):
                self._console.say(f"  {text}")
            case Lost(text=text) | Leaving(text=text):
                self._lost_at = time.monotonic()
                self._is_training = False
                self._console.say(f"  {text}")
            case Stepped(stage=stage, done=done, total=total):
                self._is_training = True
                self._tell_of_recovery(stage, done)
                self._advance(bars, stage, done, total)
            case EpochDone(row=row):
                self._records.log_epoch(row)
                shown = [f"loss {row['train/loss']:.3f}", f"train {row['train/top1']:.1%}"]
                if "test/top1" in row:
                    shown.append(f"test {row['test/top1']:.1%}")
                self._note = ", ".join(shown)
            case Sampled(stage=stage, values=values):
                self._records.log_system(stage, values)
            case Stopped(error=error):
                self._console.say(f"  stopped: {str(error).partition(chr(10))[0]}")

    def _tell_of_recovery(self, stage: int, done: int) -> None:
        if self._lost_at is not None:
            seconds = time.monotonic() - self._lost_at
            repeated = self._last_step[1] - done + 1 if stage == self._last_step[0] else 0
            self._console.say(f"  training again after {seconds:.1f} s; {max(0, repeated)} steps are repeated")
            self._lost_at = None
        elif self._last_step == (0, 0):
            self._console.say(f"  the first step is done, after {time.monotonic() - self._began:.1f} s")
        self._last_step = (stage, done)

    def _advance(self, bars: dict[int, tuple[Any, Advance]], stage: int, done: int, total: int) -> None:
        if stage not in bars:
            for bar, _ in bars.values():
                bar.__exit__(None, None, None)
            bars.clear()
            bar = self._console.progress(f"stage {stage} steps", total)
            bars[stage] = (bar, bar.__enter__())
        bars[stage][1](done, self._note)
