"""How long a trunk takes for one clip of 25 frames, by precision and memory format, against bare torchvision.

python benchmarks/trunk.py [--trunk resnet34] [--crop 224] [--repeats 5] [--threads N] [--compile] [--out FOLDER]

"tavlad" is what training and prediction run (`FrozenTrunk`), from uint8 frames to both maps. "Bare torchvision" is its
ResNet with batch norms folded by PyTorch's own `fuse_conv_bn_eval`, channels last, the whole network in the quicker
precision of this machine, given images that are normalised already: the target is 0.9 of it. For other trunks it is
left out. bf16 is left out on a CPU without instructions for it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.harness import interleaved, machine_facts, timed, write_results
from tavlad.backbone import build_trunk
from tavlad.frozen import FrozenTrunk, normalise
from tavlad.parallel import quick_precision

QUICK = quick_precision("cpu")
_BARE = f"bare torchvision, {QUICK}, folded"
_DTYPE = torch.bfloat16 if QUICK == "bf16" else torch.float32
NUM_FRAMES = 25
Run = Callable[[], object]


def _bare(name: str) -> nn.Module:
    """torchvision's own network, folded, channels last."""
    network = torchvision.models.get_model(name, weights=None).eval()
    for block in [network, *network.modules()]:
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            if isinstance(getattr(block, norm, None), nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    return network.to(_DTYPE).to(memory_format=torch.channels_last)


def _variants(name: str, crop: int, compiled: bool) -> dict[str, Run]:
    torch.manual_seed(0)
    trunk = build_trunk(name).eval()
    frames = torch.randint(0, 256, (NUM_FRAMES, 3, crop, crop), dtype=torch.uint8)
    frames = frames.contiguous(memory_format=torch.channels_last)
    last = normalise(trunk, frames, torch.float32)
    first = last.contiguous()

    def run(inputs: Tensor, *, bf16: bool) -> object:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return trunk.maps(inputs)

    def frozen(*, bf16: bool, compiled: bool = False) -> Run:
        ours = FrozenTrunk(trunk)
        ours.compile = compiled

        def run_frozen() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return ours.maps(frames, NUM_FRAMES)

        return run_frozen

    variants: dict[str, Run] = {
        "tavlad, float32": frozen(bf16=False),
        "float32, NCHW": lambda: run(first, bf16=False),
        "float32, channels last": lambda: run(last, bf16=False),
    }
    if QUICK == "bf16":
        variants |= {
            "tavlad, bf16": frozen(bf16=True),
            "bf16 autocast, NCHW": lambda: run(first, bf16=True),
            "bf16 autocast, channels last": lambda: run(last, bf16=True),
        }
    if compiled:
        variants[f"tavlad, {QUICK}, compile"] = frozen(bf16=QUICK == "bf16", compiled=True)
    if name.startswith("resnet"):
        network, images = _bare(name), last.to(_DTYPE)

        def bare() -> object:
            with torch.inference_mode():
                return cast(Tensor, network(images))

        variants[_BARE] = bare
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", default="resnet34")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="also training.compile = true")
    parser.add_argument("--only", default="", help="variants whose names contain one of these words, comma between")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = _variants(options.trunk, options.crop, options.compile)
    runs = {name: run for name, run in made.items() if any(word in name for word in options.only.split(","))}
    first = {name: timed(run)["ms"] / 1000 for name, run in runs.items()}
    rows = interleaved({name: lambda run=run: timed(run) for name, run in runs.items()}, options.repeats)
    limit = rows.get(_BARE)
    for name, row in rows.items():
        row["first_run_s"] = first[name]
        if limit is not None:
            row["of_bare"] = limit["ms"] / row["ms"]
            row["of_bare_by_cpu"] = limit["cpu_ms"] / row["cpu_ms"]
    facts = {"trunk": options.trunk, "crop": options.crop, "frames": NUM_FRAMES, "threads": options.threads}
    write_results(options.out, "trunk", facts | machine_facts(("torch", "torchvision")), {"a clip": rows})


if __name__ == "__main__":
    main()
