"""What not losing anything costs a step: Ray Train, notices and news, checkpoints, sums in a fixed order.

Every variant is the same `fit` on two ranks and the same clips made of noise. All are up at once and take turns, a few
steps each, so that what is compared ran within the same minute: a turn with the one of `torchrun` in the same round.
`python -m benchmarks.reliability --to results/`.

* torchrun: two processes by torch.distributed.run, nothing else.
* ray: the same under Ray Train, with what our workers do at each step (agree on notices, tell the news).
* checkpoint: torchrun, a checkpoint in each turn, copied and written to a folder beside training; a turn ends when it
  is whole. What one costs is shared out over the steps between two of them.
* deterministic: torchrun with `virtual_ranks`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Figures, machine_facts, write_results
from ray_jobs.checkpoints import BackgroundWriter, Checkpoints
from ray_jobs.recipe import ResourceConfig
from shards.store import open_store
from tavlad.checkpoint import ModelCard, TrainState, weights_of, write_checkpoint
from tavlad.clip import ClipBatch
from tavlad.config import ModelConfig, StageConfig, TrainingConfig
from tavlad.model import TaVlad
from tavlad.parallel import World
from tavlad.train import Listeners, StagePlan, fit

_ACTIONS = 8
_FRAMES = 8
_STAGE = StageConfig(epochs=1, lr=1e-4, trunk="last-block", fc=True, vlad=True)
_BASE = "torchrun"
_RAY = "ray"
_VARIANTS = [_RAY, "checkpoint", "deterministic"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank is told."""

    variant: str
    variants: list[str]
    """All of them, in the order of their turns."""
    rounds: int
    steps: int
    """Of a turn; the first one is not measured."""
    batch_size: int
    crop: int
    virtual_ranks: int
    folder: str


class _Turns:
    """Whose turn it is: a file, which the variant whose turn ends writes anew."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank = job, rank
        self._file = Path(job.folder, "turn")

    def wait(self, round_: int) -> None:
        """Until it is this variant's turn; before the first one, until all variants are up."""
        job = self._job
        if round_ == 0 and self._rank == 0:
            Path(job.folder, f"up-{job.variant}").touch()
            if job.variant == job.variants[0]:
                while len(list(Path(job.folder).glob("up-*"))) < len(job.variants):
                    time.sleep(0.05)
                self._give(f"0 {job.variant}")
        while not (self._file.exists() and self._file.read_text() == f"{round_} {job.variant}"):
            time.sleep(0.01)

    def end(self, round_: int) -> None:
        """The next one's turn."""
        job = self._job
        after = (job.variants.index(job.variant) + 1) % len(job.variants)
        if self._rank == 0:
            self._give(f"{round_ + (after == 0)} {job.variants[after]}")

    def _give(self, turn: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(turn)
        new.replace(self._file)


class _Noise:
    """The same clips of noise in every batch, given out when it is one's turn."""

    def __init__(self, job: Job, world: World, turns: _Turns) -> None:
        self.num_steps = job.steps * job.rounds
        self._job, self._turns = job, turns
        bounds = (job.batch_size * each // world.num_parts for each in (world.parts.start, world.parts.stop))
        own = range(*bounds)
        shape = (len(own), _FRAMES, 3, job.crop, job.crop)
        self._batch = ClipBatch(
            frames_BTCHW=torch.randint(0, 256, shape, dtype=torch.uint8),
            labels_B=torch.tensor([each % _ACTIONS for each in own]),
            keys=tuple(map(str, own)),
            num_clips_in_global_batch=job.batch_size,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ClipBatch]:
        for step in range(start_step, self.num_steps):
            if step % self._job.steps == 0:
                self._turns.wait(step // self._job.steps)
            yield self._batch


def measure(job: Job, tell: Any = None, heard: Any = None) -> None:
    """One rank's training; rank 0 leaves the seconds of each turn in a file."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    world = World.current(virtual_ranks=job.virtual_ranks if job.variant == "deterministic" else 0)
    torch.manual_seed(0)
    config = ModelConfig(trunk="resnet18", weights="none", num_clusters=16, gru_width=64)
    model = TaVlad(config, _ACTIONS)
    training = TrainingConfig(batch_size=job.batch_size, precision="float32", crop=job.crop)
    turns, seconds, began = _Turns(job, world.rank), [], 0.0
    keep, written = _keeper(job, model, world)

    def on_step(done: int, total: int) -> None:
        nonlocal began
        if tell is not None and world.rank == 0:
            tell(done, total)
        if done % job.steps == 1:
            began = time.perf_counter()
        elif done % job.steps == 0:
            written()
            seconds.append(time.perf_counter() - began)
            turns.end(done // job.steps - 1)

    def wants_state(done: int) -> bool:
        if heard is not None:
            heard()
        return job.variant == "checkpoint" and done % job.steps == 1

    listeners = Listeners(on_epoch=lambda _: None, on_step=on_step, wants_state=wants_state, on_state=keep)
    plan = StagePlan(number=2, stage=_STAGE, training=training)
    fit(model, plan, _Noise(job, world, turns), None, listeners, world=world)
    if world.rank == 0:
        Path(job.folder, f"{job.variant}.json").write_text(json.dumps(seconds))


def _keeper(job: Job, model: TaVlad, world: World) -> tuple[Callable[[TrainState], None], Callable[[], None]]:
    """What takes a state, and what waits until it is written."""
    if world.rank or job.variant != "checkpoint":
        return lambda state: None, lambda: None
    writer, checkpoints = BackgroundWriter(), Checkpoints(open_store(f"{job.folder}/store"))
    card = ModelCard(
        model=model.config, actions=("a",), num_frames=_FRAMES, short_side=job.crop, crop=job.crop, precision="float32"
    )

    def keep(state: TrainState) -> None:
        weights = weights_of(model)

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                directory = Path(folder) / "checkpoint"
                write_checkpoint(directory, weights, card, state)
                checkpoints.save(f"step{state.next_step:06d}", directory)

        writer.submit(write)

    return keep, writer.wait


def _by_torchrun(job: Job) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*command, "-m", "benchmarks.reliability", "--job", json.dumps(vars(job))]


def _by_ray(job: Job) -> None:
    """Two ranks under Ray Train, on a cluster of their own."""
    import ray
    import ray.train
    import ray.train.torch

    from ray_jobs.monitor import Monitor, Stepped
    from ray_jobs.notice import ListenForSigterm, Notice

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # as infra/site.py has it
    environment = {"MALLOC_ARENA_MAX": "1"}  # as infra/site.py has it for workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    monitor = Monitor.start()

    def work() -> None:
        notice = Notice(World.current())
        measure(job, lambda done, total: monitor.tell(Stepped(stage=2, done=done, total=total)), notice.heard)

    try:
        ray.train.torch.TorchTrainer(
            work,
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(storage_path=f"{job.folder}/ray", callbacks=[ListenForSigterm()]),
        ).fit()
    finally:
        ray.shutdown()


def _run(job: Job) -> None:
    """What a variant's process does."""
    if job.variant == _RAY:
        _by_ray(job)
        return
    dist.init_process_group("gloo")
    measure(job)
    dist.destroy_process_group()


def _wait_for(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Until all are done; the first failure ends the others, which would wait for its turn."""
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.5)
        if any(codes):
            raise SystemExit("a variant failed: see above")
    finally:
        for process in processes:
            process.terminate()


def _rows(folder: Path, variants: list[str], steps: int, checkpoint_steps: int) -> dict[str, Figures]:
    """Medians over the rounds, of milliseconds a step and of what a turn took over torchrun's of the same round."""
    seconds = {name: json.loads((folder / f"{name}.json").read_text())[1:] for name in variants}  # the first warms up
    rows: dict[str, Figures] = {}
    for name, turns in seconds.items():
        rows[name] = {"ms_a_step": 1000 * statistics.median(turns) / (steps - 1)}
        if name == _BASE:
            continue
        over = [turn - base for turn, base in zip(turns, seconds[_BASE], strict=True)]
        share = 1 / checkpoint_steps if name == "checkpoint" else 1 / (steps - 1)
        a_step = statistics.median(seconds[_BASE]) / (steps - 1)
        low, middle, high = (100 * each * share / a_step for each in statistics.quantiles(over, n=4))
        rows[name] |= {"over_torchrun_%": middle, "quartile_%": low, "other_quartile_%": high}
        if name == "checkpoint":
            rows[name]["ms_a_checkpoint"] = 1000 * statistics.median(over)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("results"), help="folder for the JSON and Markdown")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=11, help="steps of a turn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--virtual-ranks", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=_VARIANTS, default=_VARIANTS, help="variants beside torchrun")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        _run(Job(**json.loads(options.job)))
        return
    facts = machine_facts(["torch", "ray"])
    variants = [_BASE, *options.only]
    names = ("rounds", "steps", "batch_size", "crop", "virtual_ranks")
    with tempfile.TemporaryDirectory(prefix="tavlad-reliability-") as folder:
        told = {"variants": variants, "folder": folder} | {name: getattr(options, name) for name in names}
        jobs = [Job(variant=name, **told) for name in variants]
        commands = [
            [sys.executable, "-m", "benchmarks.reliability", "--job", json.dumps(vars(job))]
            if job.variant == _RAY
            else _by_torchrun(job)
            for job in jobs
        ]
        _wait_for([subprocess.Popen(command) for command in commands])
        every = ResourceConfig().checkpoint_steps
        found = _rows(Path(folder), variants, options.steps, every)
    described = facts | {name: getattr(options, name) for name in names} | {"steps between checkpoints": every}
    write_results(options.to, "reliability", described, {"Cost of a step": found})


if __name__ == "__main__":
    main()
