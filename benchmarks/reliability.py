"""What not losing anything costs a step: Ray Train, notices and news, checkpoints, sums in a fixed order.

Every variant is the same `fit` on the same two ranks and clips made of noise; `torchrun` alone is what the others are
compared with, in the same rounds. `python -m benchmarks.reliability --to results/`.

* torchrun: two processes by torch.distributed.run, nothing else.
* ray: the same under Ray Train, with what our workers do at each step (agree on notices, tell the news).
* checkpoints: torchrun, a checkpoint every `--checkpoint-steps` steps, copied and written to a folder beside training.
* checkpoints waited for: the same, but training waits until each is written.
* deterministic: torchrun with `virtual_ranks`.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Figures, interleaved, machine_facts, write_results
from tavlad.checkpoint import ModelCard, TrainState, save_weights, weights_of
from tavlad.clip import ClipBatch
from tavlad.config import ModelConfig, StageConfig, TrainingConfig
from tavlad.model import TaVlad
from tavlad.parallel import World
from tavlad.train import Listeners, StagePlan, fit

_ACTIONS = 8
_FRAMES = 8
_WARM_UP = 3
_STAGE = StageConfig(epochs=1, lr=1e-4, trunk="last-block", fc=True, vlad=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank is told."""

    variant: str
    steps: int
    batch_size: int
    crop: int
    virtual_ranks: int
    checkpoint_steps: int
    folder: str


class _Noise:
    """The same clips of noise in every batch."""

    def __init__(self, job: Job, world: World) -> None:
        self.num_steps = job.steps
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
        for _ in range(start_step, self.num_steps):
            yield self._batch


def measure(job: Job, device: torch.device, tell: Any = None, heard: Any = None) -> Figures:
    """One rank's training; milliseconds of its median step, and of the mean with every fiftieth slowest left out."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2) if device.type == "cpu" else 4)
    world = World.current(device, job.virtual_ranks if job.variant == "deterministic" else 0)
    torch.manual_seed(0)
    config = ModelConfig(trunk="resnet18", weights="none", num_clusters=16, gru_width=64)
    model = TaVlad(config, _ACTIONS).to(device)
    training = TrainingConfig(batch_size=job.batch_size, precision="float32", crop=job.crop)
    moments: list[float] = []

    def on_step(done: int, total: int) -> None:
        if tell is not None and world.rank == 0:
            tell(done, total)
        moments.append(time.perf_counter())

    def wants_state(done: int) -> bool:
        if heard is not None:
            heard()
        return job.variant.startswith("checkpoints") and done % job.checkpoint_steps == 0

    keep = _keeper(job, model, world)
    listeners = Listeners(on_epoch=lambda _: None, on_step=on_step, wants_state=wants_state, on_state=keep)
    plan = StagePlan(number=2, stage=_STAGE, training=training)
    fit(model, plan, _Noise(job, world), None, listeners, world=world)
    steps = [1000 * (after - before) for before, after in itertools.pairwise(moments)][_WARM_UP:]
    calm = sorted(steps)[: max(1, len(steps) - len(steps) // 50)]
    return {"ms_a_step_median": statistics.median(steps), "ms_a_step_mean": statistics.mean(calm)}


def _keeper(job: Job, model: TaVlad, world: World) -> Any:
    from ray_jobs.checkpoints import BackgroundWriter, Checkpoints
    from shards.store import open_store

    if world.rank or not job.variant.startswith("checkpoints"):
        return lambda state: None
    writer, checkpoints = BackgroundWriter(), Checkpoints(open_store(f"{job.folder}/store"))
    card = ModelCard(
        model=model.config, actions=("a",), num_frames=_FRAMES, short_side=job.crop, crop=job.crop, precision="float32"
    )

    def keep(state: TrainState) -> None:
        weights = weights_of(model)

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                directory = Path(folder) / "checkpoint"
                save_weights(directory, weights, card, state)
                checkpoints.save(f"step{state.next_step:06d}", directory)

        writer.submit(write)
        if job.variant == "checkpoints waited for":
            writer.wait()

    return keep


def _rank(job: Job) -> None:
    """What torchrun starts."""
    dist.init_process_group("gloo")
    figures = measure(job, torch.device("cpu"))
    if dist.get_rank() == 0:
        Path(job.folder, "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def by_torchrun(job: Job) -> Figures:
    """Two ranks of `_rank`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "benchmarks.reliability", "--job", json.dumps(vars(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(Path(job.folder, "figures.json").read_text())


def by_ray(job: Job) -> Figures:
    """Two ranks under Ray Train, on a cluster of their own."""
    import ray
    import ray.train
    import ray.train.torch

    from ray_jobs.monitor import Monitor, Stepped
    from ray_jobs.notice import ListenForSigterm, Notice

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # as infra/site.py has it
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"working_dir": None})
    monitor = Monitor.start()

    def work() -> None:
        notice = Notice(World.current())
        figures = measure(
            job,
            torch.device("cpu"),
            lambda done, total: monitor.tell(Stepped(stage=2, done=done, total=total)),
            notice.heard,
        )
        if ray.train.get_context().get_world_rank() == 0:
            Path(job.folder, "figures.json").write_text(json.dumps(figures))

    try:
        ray.train.torch.TorchTrainer(
            work,
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(storage_path=f"{job.folder}/ray", callbacks=[ListenForSigterm()]),
        ).fit()
    finally:
        ray.shutdown()
    return json.loads(Path(job.folder, "figures.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("results"), help="folder for the JSON and Markdown")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--virtual-ranks", type=int, default=4)
    parser.add_argument("--checkpoint-steps", type=int, default=20)
    parser.add_argument("--without-ray", action="store_true", help="where Ray is not installed")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        _rank(Job(**json.loads(options.job)))
        return
    facts = machine_facts(["torch", "ray"])
    with tempfile.TemporaryDirectory(prefix="tavlad-reliability-") as folder:

        def job(variant: str) -> Job:
            return Job(
                variant=variant,
                steps=options.steps,
                batch_size=options.batch_size,
                crop=options.crop,
                virtual_ranks=options.virtual_ranks,
                checkpoint_steps=options.checkpoint_steps,
                folder=folder,
            )

        names = ["torchrun", "checkpoints", "checkpoints waited for", "deterministic"]
        variants = {name: (lambda name=name: by_torchrun(job(name))) for name in names}
        if not options.without_ray:
            variants["ray"] = lambda: by_ray(job("ray"))
        found = interleaved(variants, options.repeats)
    base = found["torchrun"]
    for figures in found.values():
        for key in ("ms_a_step_median", "ms_a_step_mean"):
            figures[f"{key.removeprefix('ms_a_step_')}_over_torchrun_%"] = 100 * (figures[key] / base[key] - 1)
    write_results(options.to, "reliability", facts | vars(options) | {"to": "", "job": ""}, {"Cost of a step": found})


if __name__ == "__main__":
    main()
