"""How long a trunk takes for one clip of 25 frames, by precision and memory format; interleaved repeats, medians.

python benchmarks/trunk.py [--trunk resnet34] [--crop 224] [--repeats 5]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from tavlad.backbone import build_trunk

NUM_FRAMES = 25


def _variants(name: str, crop: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    trunk = build_trunk(name).eval()
    images = torch.rand(NUM_FRAMES, 3, crop, crop)
    last = images.contiguous(memory_format=torch.channels_last)

    def run(inputs: torch.Tensor, *, bf16: bool) -> object:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return trunk.maps(inputs)

    return {
        "float32, NCHW": lambda: run(images, bf16=False),
        "float32, channels last": lambda: run(last, bf16=False),
        "bf16 autocast, NCHW": lambda: run(images, bf16=True),
        "bf16 autocast, channels last": lambda: run(last, bf16=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", default="resnet34")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    variants = _variants(options.trunk, options.crop)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    slowest = max(medians.values())
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} s a clip | {slowest / median:.1f}x |")
    facts = {"trunk": options.trunk, "crop": options.crop, "frames": NUM_FRAMES, "threads": torch.get_num_threads()}
    print(json.dumps(facts | {"seconds_per_clip": medians, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
