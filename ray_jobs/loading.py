"""How a worker reads clips: how many threads, and whether a GPU decodes; chosen from rates measured at the start."""

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
_FEEDING_THREADS = 4  # enough for fetching and for handing JPEGs to a GPU


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


Decoder = Literal["cpu", "gpu", "once"]
"""What decodes clips: processors; nvJPEG; or processors once, after which the frames stay in the GPU's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How clips are read."""

    threads: int
    train: Decoder
    test: Decoder
    reason: str


def choose_loading(resources: ResourceConfig, rates: LoadingRates, cores: int, memory: GpuMemory | None) -> Loading:
    """Threads as the recipe says, or as many as the rates ask for and this worker's `cores` allow. With `decode` =
    "auto", where these threads cannot keep up with a GPU, its clips are decoded once if they all fit; else by it.

    All or none of a part's, and by what the index says: what decodes a clip must not depend on when it is read.
    """
    needed = max(1, math.ceil(_MARGIN * rates.decode / rates.score))
    threads = resources.loader_threads or min(needed, max(1, cores - 1))
    train: Decoder = "cpu"
    test: Decoder = "cpu"
    how = ""
    is_behind = resources.decode == "gpu" or (resources.decode == "auto" and threads < needed)
    if memory is not None and is_behind:
        if memory.train <= memory.room:
            train, test = "once", "once" if memory.train + memory.test <= memory.room else "cpu"
            taken = memory.train + (memory.test if test == "once" else 0)
            how = f", decoded once and kept in the GPU's memory ({taken / 1e9:.1f} GB)"
        else:
            train = test = "gpu"
            threads = threads if resources.loader_threads else min(threads, _FEEDING_THREADS)
            how = f", decoded on the GPU, whose memory they do not fit in ({memory.train / 1e9:.1f} GB)"
    times = f"a clip takes {1000 * rates.decode:.1f} ms to decode and {1000 * rates.score:.1f} ms to score"
    text = f"clips are read by {threads} threads{how}: {times}"
    if threads < needed and train == "cpu":
        text += f", which {needed} threads would keep up with"
    return Loading(threads=threads, train=train, test=test, reason=text)


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
