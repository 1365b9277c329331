"""Everything that is measured on a GPU, in one JSON. Run it by benchmarks/gpu.sh, which says more.

python benchmarks/gpu.py [--smoke] [--set FOLDER] [--schedule SIZE] [--only PART]... [--out FILE]

Each part is tried by itself: what fails leaves its reason in the JSON, and the rest goes on. Nothing of Ray, MLflow or
a store is needed: training is `tavlad.train.fit`.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.harness import machine_facts
from benchmarks.head import plain
from benchmarks.shard_sets import pack_rendered, repeated
from benchmarks.stage2 import NUM_ACTIONS, InMemory, random_batch, untrained
from tavlad.config import STAGE1, STAGE2, StageConfig, TrainingConfig
from tavlad.evaluate import evaluate
from tavlad.model import FrameMaps, TaVlad
from tavlad.parallel import World, autocast
from tavlad.train import Batches, EpochReport, Listeners, StagePlan, fit

GMAC_TRUNK = 92.0  # ResNet-34 forward of a clip of 25 frames at 224
CLIPS_OF_A_SPLIT, CLIPS_OF_A_TEST = 3570, 1530
Part = Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how large: the paper's sizes, or a rehearsal's."""

    device: torch.device
    smoke: bool
    shards: Path | None

    @property
    def crop(self) -> int:
        return 32 if self.smoke else 224

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return (2,) if self.smoke else (32, 64, 128)

    @property
    def world(self) -> World:
        return World(device=self.device)

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median of runs after one that warms up; the device is idle before and after each."""
        times: list[float] = []
        for _ in range(1 if self.smoke else repeats + 1):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return sorted(times[1:] or times)[len(times[1:]) // 2]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_gb(self, run: Callable[[], object]) -> float | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9


def _peak_tflops(bench: Bench) -> float:
    """bf16 products of 8192 x 8192, the best of five: what the card gives, not what its data sheet says."""
    size = 256 if bench.smoke else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / bench.seconds(lambda: a @ b) / 1e12


def _trunk(bench: Bench, ways: dict[str, tuple[bool, bool, bool]]) -> dict[str, Any]:
    """Forward passes from uint8 frames: is it fused, `compile` and `cuda_graphs`; a fused one is not compiled."""
    peak, found = _peak_tflops(bench), dict[str, Any]()
    num_clips = bench.batch_sizes[0]
    frames = random_batch(num_clips, bench.crop).frames_BTCHW.to(bench.device)
    for name, (is_fused, compiled, graphs) in ways.items():
        model = untrained().to(bench.device).eval()
        began = time.perf_counter()
        model.speed(compile=compiled, cuda_graphs=graphs, recompute=False)
        if not is_fused:
            model.trunk.fuse = lambda: False  # type: ignore[method-assign]

        def run(model: TaVlad = model) -> None:
            with torch.no_grad(), autocast(bench.device, "bf16"):
                model.features(frames)

        run()
        bench.wait()
        first, seconds = time.perf_counter() - began, bench.seconds(run)
        tflops = num_clips * 2e9 * GMAC_TRUNK * (bench.crop / 224) ** 2 / seconds / 1e12
        found[name] = {"clips_per_second": num_clips / seconds, "first_s": first, "of_the_peak": tflops / peak}
    return found | {"peak_bf16_tflops": peak}


def _head(bench: Bench) -> dict[str, Any]:
    num_clips, places = bench.batch_sizes[0], 49
    model = untrained("resnet18").to(bench.device).train()
    model.trunk.requires_grad_(False)
    assert model.vlad is not None
    x = nn.functional.normalize(torch.randn(num_clips, 25, places, 512, device=bench.device), dim=-1).requires_grad_()
    attention = torch.rand(num_clips, 25, places, device=bench.device)

    def vlad(run: Callable[..., torch.Tensor]) -> None:
        model.zero_grad()
        run(model.vlad, x, attention).sum().backward()

    def whole() -> None:
        model.zero_grad()
        with autocast(bench.device, "bf16"):
            logits = model.classify(FrameMaps(descriptors_BTND=x, attention_BTN=attention))
        logits.sum().backward()

    forms: dict[str, Callable[[], None]] = {
        "vlad": lambda: vlad(lambda layer, *inputs: layer(*inputs)),
        "vlad by autograd": lambda: vlad(plain),
        "whole head": whole,
    }
    return {name: {"ms": 1000 * bench.seconds(run), "peak_gb": bench.peak_gb(run)} for name, run in forms.items()}


def _fit(bench: Bench, stage: StageConfig, number: int, batches: Batches, model: nn.Module, **changes: Any) -> float:
    """Seconds of an epoch, or of `epochs`."""
    stage = dataclasses.replace(stage, epochs=changes.pop("epochs", 1))
    training = TrainingConfig(batch_size=changes.pop("batch_size"), crop=bench.crop, **changes)
    plan = StagePlan(number=number, stage=stage, training=training)  # type: ignore[arg-type]
    bench.wait()
    began = time.perf_counter()
    fit(model, plan, batches, None, Listeners(on_epoch=lambda _: None), world=bench.world)  # type: ignore[arg-type]
    bench.wait()
    return time.perf_counter() - began


def _steps(bench: Bench, stage: StageConfig, number: int, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Clips a second from page-locked batches in memory; the step alone, without reading."""
    found: dict[str, Any] = {}
    for size in bench.batch_sizes:
        batch = random_batch(size, bench.crop)
        if bench.device.type == "cuda":
            batch = dataclasses.replace(batch, frames_BTCHW=batch.frames_BTCHW.pin_memory())
        for name, changes in ways.items():
            model, num_steps = untrained().to(bench.device), 1 if bench.smoke else 10
            first = _fit(bench, stage, number, InMemory(batch, 2), model, batch_size=size, **changes)
            seconds = _fit(bench, stage, number, InMemory(batch, num_steps), model, batch_size=size, **changes)
            step = InMemory(batch)
            peak = bench.peak_gb(
                lambda: _fit(bench, stage, number, step, model, batch_size=size, **changes)  # noqa: B023  called at once
            )
            found[f"{name}, batch {size}"] = {
                "clips_per_second": size * num_steps / seconds,
                "first_s": first,
                "peak_gb": peak,
            }
    return found


def _loader(bench: Bench, num_clips: int, batch_size: int, decoder: str) -> Any:
    """The packed set's clips over and over, as many as a split has; decoded by "cpu", "once" or "nvjpeg"."""
    from shards.index import load_index
    from shards.read import ClipLoader, LoaderOptions
    from shards.store import open_store

    if bench.shards is None:
        raise ValueError("no packed set was given: --set FOLDER, made by `python -m benchmarks.shard_sets FOLDER`")
    store = open_store(str(bench.shards))
    options = LoaderOptions(
        batch_size=batch_size,
        seed=0,
        crop=bench.crop,
        augment=True,
        shuffle=True,
        num_threads=os.cpu_count() or 1,
        pin_memory=bench.device.type == "cuda",
        gpu=bench.device if decoder != "cpu" else None,
        keep_decoded=decoder == "once",
    )
    return ClipLoader(repeated(load_index(store), num_clips), store, 1, "train", options)


def _reading(bench: Bench) -> dict[str, Any]:
    """Clips a second without any model; clips decoded once are read for the second time."""
    found: dict[str, Any] = {}
    for decoder in ("cpu", "nvjpeg", "once"):
        loader = _loader(bench, 16 if bench.smoke else 1600, bench.batch_sizes[0], decoder)
        if decoder == "once":
            for _ in loader.epoch(0):
                pass
        began = time.perf_counter()
        clips = sum(len(batch.keys) for batch in loader.epoch(1))
        bench.wait()
        found[decoder] = {"clips_per_second": clips / (time.perf_counter() - began)}
    return found | {"threads": os.cpu_count()}


def _epochs(bench: Bench) -> dict[str, Any]:
    """An epoch of each stage from packed shards decoded before, and what the paper's 50 + 30 would come to."""
    found: dict[str, Any] = {}
    num_clips = 8 if bench.smoke else CLIPS_OF_A_SPLIT
    for size in bench.batch_sizes[:1]:
        loader, model = _loader(bench, num_clips, size, "once"), untrained().to(bench.device)
        began = time.perf_counter()
        for _ in loader.epoch(0):
            pass
        decoding = time.perf_counter() - began
        stages = {1: STAGE1, 2: STAGE2}
        seconds = {
            number: _fit(bench, stage, number, loader, model, batch_size=size) for number, stage in stages.items()
        }
        found[f"batch {size}"] = {
            "decoding_once_s": decoding,
            "stage1_epoch_s": seconds[1],
            "stage2_epoch_s": seconds[2],
            "stage2_clips_per_second": num_clips / seconds[2],
            "schedule_s_extrapolated": decoding + sum(seconds[number] * each.epochs for number, each in stages.items()),
        }
    return found


def _schedule(bench: Bench, size: int) -> dict[str, Any]:
    """The paper's 50 + 30 epochs, from packed shards that nothing was read of before; then the test part's scores."""
    num_clips, num_scored = (8, 4) if bench.smoke else (CLIPS_OF_A_SPLIT, CLIPS_OF_A_TEST)
    loader, model = _loader(bench, num_clips, size, "once"), untrained().to(bench.device)
    epochs: dict[str, list[float]] = {"stage 1": [], "stage 2": []}
    began = before = time.perf_counter()

    def told(report: EpochReport) -> None:
        nonlocal before
        now = time.perf_counter()
        epochs[f"stage {report.stage}"].append(round(now - before, 2))
        before = now
        if report.epoch % 5 == 0:
            print(f"stage {report.stage}, epoch {report.epoch}: {now - began:.0f} s", flush=True)

    for number, stage in ((1, STAGE1), (2, STAGE2)):
        stage = dataclasses.replace(stage, epochs=1) if bench.smoke else stage
        plan = StagePlan(number=number, stage=stage, training=TrainingConfig(batch_size=size, crop=bench.crop))
        fit(model, plan, loader, None, Listeners(on_epoch=told), world=bench.world)
    bench.wait()
    training = time.perf_counter() - began
    began = time.perf_counter()
    evaluate(model, _loader(bench, num_scored, size, "once").epoch(0), "bf16", bench.world)
    scoring = time.perf_counter() - began
    return {"whole_schedule_s": training, "scoring_s": scoring, "clips": num_clips, "epochs_s": epochs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without a GPU: does all of it run?")
    parser.add_argument("--set", type=Path, help="a packed set, made by `python -m benchmarks.shard_sets FOLDER`")
    parser.add_argument("--schedule", type=int, metavar="SIZE", help="only 50 + 30 epochs with batches of this size")
    parser.add_argument("--only", action="append", metavar="PART", help="this part alone; again for another")
    parser.add_argument("--seconds", type=float, default=480, help="parts that would begin later are left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("there is no CUDA device here: --smoke rehearses on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="tavlad-bench-") as folder:
        shards = options.set
        if shards is None and options.smoke:
            shards = Path(folder) / "set"
            pack_rendered(shards, 3)
        sys.exit(_measure(Bench(device=device, smoke=options.smoke, shards=shards), options))


def _measure(bench: Bench, options: argparse.Namespace) -> bool:
    """Each part in turn, written down as it comes; whether one of them failed."""
    device = bench.device
    compiled: dict[str, dict[str, Any]] = {"compile": {"compile": True}}
    compiled["graphs"] = {"compile": True, "cuda_graphs": True}
    parts: dict[str, Part] = {
        "trunk forward": lambda: _trunk(bench, {"fused": (True, False, False), "plain": (False, False, False)}),
        "stage 2, steps": lambda: _steps(bench, STAGE2, 2, {"plain": {}, "recompute": {"recompute": True}}),
        "stage 1, steps": lambda: _steps(bench, STAGE1, 1, {"plain": {}}),
        "reading": lambda: _reading(bench),
        "epochs": lambda: _epochs(bench),
        "head": lambda: _head(bench),
        "trunk forward, compiled": lambda: _trunk(
            bench, {"compile": (False, True, False), "graphs": (False, True, True)}
        ),
        "stage 2, steps, compiled": lambda: _steps(bench, STAGE2, 2, compiled),
    }
    if options.schedule:
        parts = {"schedule": lambda: _schedule(bench, options.schedule)}
    if options.only:
        parts = {name: parts[name] for name in options.only}
    facts = machine_facts(("torch", "torchvision")) | {"actions": NUM_ACTIONS, "smoke": options.smoke}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"facts": facts}
    began = time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        started = time.perf_counter()
        if started - began > options.seconds:
            found[name] = {"left_out": f"{options.seconds:.0f} s were over"}
            continue
        try:
            found[name] = part()
        except Exception as error:  # noqa: BLE001  the other parts still can be measured
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        found[name] |= {"took_s": time.perf_counter() - started}
        print(json.dumps({name: found[name]}), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")  # what is known survives a time limit
    return any("failed" in part for part in found.values())


if __name__ == "__main__":
    main()
