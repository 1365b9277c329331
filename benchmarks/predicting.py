"""`tavlad predict` against the bare loop of the same work, on real clips: median ratio of interleaved rounds; memory.

The bare loop decodes one clip after the other, crops, and runs the model on batches of 8 in its own precision: the
least that prediction can do, without reading ahead, without the JPEG that packing would have made, without tables.

python benchmarks/predicting.py VIDEOS... [--trunk efficientnet_lite0] [--crop 224] [--clips 100] [--rounds 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ray_jobs.clips import UnusableVideo
from ray_jobs.predict import find_videos
from ray_jobs.served_model import ServedModel
from shards.transforms import crop_clip
from shards.video import decode_clip
from tavlad.backbone import load_weights
from tavlad.checkpoint import ModelCard, load_model, save_checkpoint
from tavlad.config import ModelConfig
from tavlad.model import TaVlad
from tavlad.parallel import autocast

NUM_FRAMES = 25
BATCH_SIZE = 8


def build(directory: Path, trunk: str, crop: int) -> None:
    """A model of this size; what it says does not matter."""
    torch.manual_seed(0)
    config = ModelConfig(trunk=trunk, weights="none")
    model = TaVlad(config, 51)
    if trunk == "efficientnet_lite0":
        load_weights(model.trunk, trunk, "imagenet")
    card = ModelCard(
        model=config,
        actions=tuple(f"action {number}" for number in range(51)),
        num_frames=NUM_FRAMES,
        short_side=crop * 8 // 7,
        crop=crop,
        precision="bf16",
    )
    save_checkpoint(directory, model, card)


@torch.no_grad()
def bare(directory: Path, videos: list[Path]) -> float:
    model, card = load_model(directory)
    started = time.perf_counter()
    for place in range(0, len(videos), BATCH_SIZE):
        clips = []
        for video in videos[place : place + BATCH_SIZE]:
            frames_THWC = decode_clip(video, card.num_frames, card.short_side).frames_THWC
            clips.append(crop_clip(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2), None, card.crop))
        with autocast(torch.device("cpu"), card.precision):
            model(torch.stack(clips)).float().softmax(dim=1)
    return len(videos) / (time.perf_counter() - started)


def ours(directory: Path, videos: list[Path]) -> float:
    model = ServedModel(directory)
    started = time.perf_counter()
    answers = list(model.answers(videos))
    assert not [each for each in answers if isinstance(each, UnusableVideo)]
    return len(videos) / (time.perf_counter() - started)


def peak_megabytes(directory: Path, videos: list[Path]) -> float:
    """Of a process of its own that predicts these."""
    command = [sys.executable, __file__, "--peak-of", str(directory), *map(str, videos)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--trunk", default="efficientnet_lite0")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = find_videos(options.videos)
    if options.peak_of is not None:
        for answer in ServedModel(options.peak_of).answers(found):
            assert not isinstance(answer, UnusableVideo)
        # Not getrusage: its peak is inherited from the process that started this one.
        (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak.split()[1]) / 1024)
        return
    videos = found[:: max(1, len(found) // options.clips)][: options.clips]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        build(directory, options.trunk, options.crop)
        ours(directory, videos[:BATCH_SIZE])  # warms up
        rounds: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            rounds.append((bare(directory, videos), ours(directory, videos)))
            print(f"bare {rounds[-1][0]:.2f}, predict {rounds[-1][1]:.2f} clips/s", file=sys.stderr, flush=True)
        quarter = peak_megabytes(directory, videos[::4])
        whole = peak_megabytes(directory, videos)
    ratios = [second / first for first, second in rounds]
    facts = {
        "trunk": options.trunk,
        "crop": options.crop,
        "clips": len(videos),
        "threads": torch.get_num_threads(),
        "bare_clips_per_second": statistics.median(first for first, _ in rounds),
        "predict_clips_per_second": statistics.median(second for _, second in rounds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        f"peak_megabytes_of_{len(videos[::4])}_clips": quarter,
        f"peak_megabytes_of_{len(videos)}_clips": whole,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
