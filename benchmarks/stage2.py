"""A step of stage 2, and its memory, against a naive one; and what the last block's share of it is.

python benchmarks/stage2.py [--clips 2] [--crop 224] [--repeats 3] [--threads N] [--compile] [--out FOLDER]

The naive step is what a first port does: float32, channels first, frames of the whole trunk in autograd's graph, the
textbook's head (a loop over clusters, torch.nn.GRU). Both train the same parameters by Adam. Memory is the peak of a
first step in a process of its own, above the model and the batch.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.harness import Figures, interleaved, machine_facts, peak_mb, timed, write_results
from benchmarks.head import TextbookHead
from tavlad.attention import class_activation
from tavlad.clip import Batch, ClipBatch
from tavlad.config import STAGE2, ModelConfig, TrainingConfig
from tavlad.frozen import normalise
from tavlad.model import FrameMaps, TaVlad
from tavlad.optim import build_optimizer, choose_trained
from tavlad.parallel import autocast
from tavlad.train import Listeners, StagePlan, fit
from tavlad.winograd import Convolution

NUM_FRAMES, NUM_ACTIONS = 25, 51
Run = Callable[[], object]


class InMemory:
    """The same batch again and again."""

    def __init__(self, batch: Batch, num_steps: int = 1) -> None:
        self._batch, self.num_steps = batch, num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        return iter([self._batch] * (self.num_steps - start_step))


def random_batch(num_clips: int, crop: int) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    return ClipBatch(
        frames_BTCHW=torch.randint(
            0, 256, (num_clips, NUM_FRAMES, 3, crop, crop), dtype=torch.uint8, generator=generator
        ),
        labels_B=torch.arange(num_clips) % NUM_ACTIONS,
        keys=tuple(f"clip{number}" for number in range(num_clips)),
        num_clips_in_global_batch=num_clips,
    )


def untrained(trunk: str = "resnet34") -> TaVlad:
    torch.manual_seed(0)
    config = ModelConfig(trunk=trunk, weights="none")
    model = TaVlad(config, NUM_ACTIONS)
    assert model.vlad is not None
    model.vlad.initialise(nn.functional.normalize(torch.randn_like(model.vlad.centres), dim=1), config.alpha)
    return model


def ours(num_clips: int, crop: int, **changes: object) -> Run:
    """A step of `tavlad.train.fit`."""
    training = dataclasses.replace(TrainingConfig(batch_size=num_clips, crop=crop), **changes)
    plan = StagePlan(number=2, stage=dataclasses.replace(STAGE2, epochs=1), training=training)
    model, batches = untrained(), InMemory(random_batch(num_clips, crop))
    return lambda: fit(model, plan, batches, None, Listeners(on_epoch=lambda _: None))


def naive(num_clips: int, crop: int) -> Run:
    model, batch = untrained().train(), random_batch(num_clips, crop)
    choose_trained(model, STAGE2)
    optimizer = build_optimizer(model, STAGE2, TrainingConfig())
    model.trunk.requires_grad_(True)
    for module in model.trunk.modules():
        if isinstance(module, Convolution):
            module.plain = True
    head = TextbookHead(model)

    def run() -> None:
        images = normalise(model.trunk, batch.frames_BTCHW.flatten(0, 1), torch.float32).contiguous()
        maps = model.trunk.maps(images)
        pre_BTND, post_BTND = (
            each.flatten(2).transpose(1, 2).unflatten(0, (num_clips, NUM_FRAMES))
            for each in (maps.pre_relu_BDHW, maps.post_relu_BDHW)
        )
        attention_BTN = class_activation(post_BTND, model.trunk.classifier).sigmoid()
        x_BTND = nn.functional.normalize(pre_BTND, dim=-1, eps=1e-12)
        logits_BA = head(FrameMaps(descriptors_BTND=x_BTND, attention_BTN=attention_BTN))
        model.zero_grad()
        nn.functional.cross_entropy(logits_BA, batch.labels_B).backward()
        optimizer.step()

    return run


def _trunk_alone(num_clips: int, crop: int) -> Run:
    """The forward pass of the whole frozen trunk in the quicker precision: what no step can do without."""
    model, batch = untrained().eval(), random_batch(num_clips, crop)

    def run() -> None:
        with torch.inference_mode(), autocast(torch.device("cpu"), "auto"):
            model.features(batch.frames_BTCHW)

    return run


def _variants(num_clips: int, crop: int, compiled: bool) -> dict[str, Callable[[], Run]]:
    variants: dict[str, Callable[[], Run]] = {
        "tavlad": lambda: ours(num_clips, crop),
        "tavlad, recompute": lambda: ours(num_clips, crop, recompute=True),
        "tavlad, float32": lambda: ours(num_clips, crop, precision="float32"),
        "naive": lambda: naive(num_clips, crop),
        "trunk forward alone": lambda: _trunk_alone(num_clips, crop),
    }
    if compiled:
        variants["tavlad, compile"] = lambda: ours(num_clips, crop, compile=True)
    return variants


def _memory_child(name: str, num_clips: int, crop: int) -> None:
    _trunk_alone(1, 32)()  # libraries load themselves at their first use
    print(json.dumps(peak_mb(_variants(num_clips, crop, compiled=False)[name]())))


def _peak_mb(name: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--clips", str(options.clips), "--crop"]
    ended = subprocess.run([*command, str(options.crop)], capture_output=True, text=True, check=True, timeout=600)
    return float(json.loads(ended.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="also training.compile = true")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, measured in other processes")
    parser.add_argument("--only", default="", help="variants whose names contain one of these words, comma between")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        _memory_child(options.memory_of, options.clips, options.crop)
        return
    words = options.only.split(",")
    made = _variants(options.clips, options.crop, options.compile)
    runs = {name: make() for name, make in made.items() if any(word in name for word in words)}
    first = {name: timed(run)["ms"] / 1000 for name, run in runs.items()}
    rows = interleaved({name: lambda run=run: timed(run) for name, run in runs.items()}, options.repeats)
    table: dict[str, Figures] = {}
    for name, row in rows.items():
        table[name] = row | {"clips_per_second": 1000 * options.clips / row["ms"], "first_run_s": first[name]}
        if "tavlad" in rows:
            table[name]["tavlad_is_quicker"] = row["ms"] / rows["tavlad"]["ms"]
            table[name]["tavlad_is_quicker_by_cpu"] = row["cpu_ms"] / rows["tavlad"]["cpu_ms"]
        if not options.no_memory and "compile" not in name:
            table[name]["peak_mb"] = _peak_mb(name, options)
    facts = {"clips": options.clips, "crop": options.crop, "threads": options.threads, "repeats": options.repeats}
    write_results(options.out, "stage2", facts | machine_facts(("torch",)), {"step of stage 2": table})


if __name__ == "__main__":
    main()
