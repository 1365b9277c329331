"""What packing a clip costs, step by step, and what one process packs a second: `python benchmarks/packing.py VIDEOS`.

VIDEOS is a folder per action. Each step is timed alone, in CPU milliseconds a clip, the median of several rounds over
the same files, which an earlier round has brought into the page cache. "all candidates converted" is how clips were
decoded before only the chosen frames were: RGB conversion of the candidates of three frame counts, by PyAV's own way,
here without the shrinking of all of them, which came on top.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import torch

from shards.clip_bytes import encode_jpeg
from shards.datasets import scan
from shards.pack import pack_shard
from shards.plan import PackOptions, plan_packing
from shards.store import open_store
from shards.video import decode_clip
from tavlad.clip import uniform_frame_indices

_ROUNDS = 5


def decode_all(path: Path) -> int:
    """The frames, decoded and dropped: what no packer can save."""
    with av.open(str(path), metadata_errors="replace") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def decode_converting_candidates(path: Path, num_frames: int) -> int:
    """Decoding as it was: each frame that one of three counts might choose is converted, with threads of its own."""
    with av.open(str(path), metadata_errors="replace") as container:
        guess = sum(1 for packet in container.demux(video=0) if packet.size)
    wanted = {i for count in range(max(1, guess - 2), guess + 1) for i in uniform_frame_indices(count, num_frames)}
    with av.open(str(path), metadata_errors="replace") as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = enumerate(container.decode(video=0))
        return len([frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted])


def digest(path: Path) -> str:
    """Of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sketch(path: Path) -> str:
    """Of the file's first and last 64 KiB: what a plan knew a video by before."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return hashlib.sha256(head + file.read()).hexdigest()


def cpu_ms(work: Callable[[Path], object], paths: Sequence[Path]) -> float:
    """CPU milliseconds a file, median over the rounds."""
    rounds: list[float] = []
    for _ in range(_ROUNDS + 1):
        start = time.process_time()
        for path in paths:
            work(path)
        rounds.append((time.process_time() - start) * 1000 / len(paths))
    return statistics.median(rounds[1:])


def packing_seconds(videos: Path, options: PackOptions, num_threads: int) -> tuple[float, float]:
    """Wall and CPU seconds of one process that packs the folder on to a disk, medians over the rounds."""
    plan = plan_packing(scan("benchmark", videos, "folders"), options)
    walls: list[float] = []
    cpus: list[float] = []
    for _ in range(_ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.perf_counter(), time.process_time()
            for number in range(len(plan.shards)):
                pack_shard(plan, number, open_store(folder), num_threads=num_threads)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("videos", type=Path, help="a folder per action")
    parser.add_argument("--num-frames", type=int, default=25)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--clips", type=int, default=30, help="at most so many, evenly chosen, for the single steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_frames, short_side = arguments.num_frames, arguments.short_side
    everything = [video.path for video in scan("benchmark", arguments.videos, "folders").videos]
    paths = everything[:: -(-len(everything) // arguments.clips)]
    clips = {path: torch.from_numpy(decode_clip(path, num_frames, short_side).frames_THWC) for path in paths}
    steps: dict[str, Callable[[Path], object]] = {
        "digest of the whole file": digest,
        "digest of its ends (before)": sketch,
        "decoding alone": decode_all,
        "decoding, all candidates converted (before)": partial(decode_converting_candidates, num_frames=num_frames),
        "decode_clip": partial(decode_clip, num_frames=num_frames, short_side=short_side),
        "JPEGs": lambda path: [encode_jpeg(frame_HWC.permute(2, 0, 1), 90) for frame_HWC in clips[path]],
    }
    num_bytes = sum(path.stat().st_size for path in paths) / len(paths)
    print(f"{len(paths)} of {len(everything)} clips, {num_bytes / 1000:.0f} kB each; CPU ms a clip")
    for name, work in steps.items():
        print(f"{cpu_ms(work, paths):8.2f}  {name}")
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(digest, everything))
    seconds, total = time.perf_counter() - start, sum(path.stat().st_size for path in everything)
    print(f"digests of all {len(everything)} files, 16 threads: {total / seconds / 1e6:.0f} MB/s from the page cache")
    for how, format_, num_threads in (("1 thread", "frames", 1), ("2 threads", "frames", 2), ("2 threads", "video", 2)):
        options = PackOptions(format=format_, num_frames=num_frames, short_side=short_side)
        wall, cpu = packing_seconds(arguments.videos, options, num_threads)
        rates = f"{len(everything) / wall:8.1f} clips/s, {len(everything) / cpu:.1f} a CPU second"
        print(f"{rates}: packed by one process, {how}, format {format_}")


if __name__ == "__main__":
    main()
