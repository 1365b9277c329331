"""How a worker reads clips: how many threads, and whether they stay decoded in a GPU's memory.

Chosen from rates measured at the start: it changes the time that reading takes, and no pixel.
"""

import math
import os
import time
from dataclasses import dataclass
from typing import Literal

import torch

from ray_jobs.recipe import ResourceConfig
from shards.index import Index
from shards.read import ClipLoader
from tavlad.model import TaVlad
from tavlad.parallel import autocast

_PROBED_CLIPS = 3
_MARGIN = 1.25  # more clips than the model takes, so that it never waits
_FEEDING_THREADS = 4  # enough for fetching and for handing JPEGs to nvJPEG


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingRates:
    """Measured seconds for one clip."""

    decode: float
    """Of one processor, from the packed clip to its view."""
    score: float
    """Of the model's forward pass: no stage takes clips sooner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Bytes of this rank's GPU, and what the decoded clips would take of them."""

    room: int
    train: int
    test: int


Decoder = Literal["cpu", "once", "nvjpeg"]
"""What decodes clips: processors; processors once, after which the frames stay in the GPU's memory; or nvJPEG."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How clips are read."""

    threads: int
    train: Decoder
    test: Decoder
    reason: str


def choose_loading(
    resources: ResourceConfig, rates: LoadingRates, cores: int, memory: GpuMemory | None, *, nvjpeg: bool = False
) -> Loading:
    """Threads as the recipe says, or as many as the rates ask for and this worker's `cores` allow. With `decode` =
    "auto", where these threads cannot keep up with a GPU, its clips are decoded once if they all fit there.

    `nvjpeg`: the recipe has it decode the training part. Nothing measured may choose that, since its pixels are others.
    """
    needed = max(1, math.ceil(_MARGIN * rates.decode / rates.score))
    threads = resources.loader_threads or min(needed, max(1, cores - 1))
    train, test = _decoders(memory, resources.decode == "gpu" or (resources.decode == "auto" and threads < needed))
    how = ""
    if nvjpeg:
        train, how = "nvjpeg", ", those of training decoded by nvJPEG"
        threads = threads if resources.loader_threads else min(threads, _FEEDING_THREADS)
    elif train == "once":
        assert memory is not None
        taken = memory.train + (memory.test if test == "once" else 0)
        how = f", decoded once and kept in the GPU's memory ({taken / 1e9:.1f} GB)"
    times = f"a clip takes {1000 * rates.decode:.1f} ms to decode and {1000 * rates.score:.1f} ms to score"
    text = f"clips are read by {threads} threads{how}: {times}"
    if threads < needed and train == "cpu":
        text += f", which {needed} threads would keep up with"
        if memory is not None and memory.train > memory.room:
            text += f"; decoded, they take {memory.train / 1e9:.1f} GB, more than the GPU has room for"
    return Loading(threads=threads, train=train, test=test, reason=text)


def _decoders(memory: GpuMemory | None, is_wanted: bool) -> tuple[Decoder, Decoder]:
    """Of the training part and of the test part: on a GPU, if that is wanted and all clips of a part fit."""
    if memory is None or not is_wanted or memory.train > memory.room:
        return "cpu", "cpu"
    return "once", "once" if memory.train + memory.test <= memory.room else "cpu"


def memory_of(device: torch.device, share: float, index: Index, split: int) -> GpuMemory | None:
    """What a GPU has to spare for decoded clips: half of what is free, of a rank's `share` of it; None for a CPU."""
    if device.type != "cuda":
        return None
    train, test = (index.decoded_bytes(index.clips(split, part)) for part in ("train", "test"))
    free, _ = torch.cuda.mem_get_info(device)
    return GpuMemory(room=int(free * min(1.0, share) / 2), train=train, test=test)


def measure_loading(
    model: TaVlad, loader: ClipLoader, device: torch.device, precision: str, batch_size: int
) -> LoadingRates:
    """What decoding and scoring a clip take here and now. A GPU scores a batch at once, a CPU a clip."""
    rows = [row % loader.num_clips for row in range(_PROBED_CLIPS + 1)]
    first = loader.read_view(rows[0], None)  # warms up
    began = time.process_time()
    for row in rows[1:]:
        loader.read_view(row, None)
    decode = (time.process_time() - began) / _PROBED_CLIPS
    num_clips = batch_size if device.type == "cuda" else 1
    frames_BTCHW = first[None].expand(num_clips, *first.shape).to(device)
    model.eval()
    score = 0.0
    for _ in range(2):  # the first time warms up
        began = time.perf_counter()
        with torch.no_grad(), autocast(device, precision):
            model(frames_BTCHW).sum().item()
        score = (time.perf_counter() - began) / num_clips
    return LoadingRates(decode=decode, score=score)


def cores_of_a_rank(ranks_on_this_node: int) -> int:
    """Processors for each of them, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_on_this_node)
