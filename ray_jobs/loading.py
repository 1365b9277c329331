"""How a worker reads clips: how many threads, and whether a GPU decodes; chosen from rates measured at the start."""

import math
import os
import time
from dataclasses import dataclass

import torch

from ray_jobs.recipe import ResourceConfig
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
class Loading:
    """How clips are read."""

    threads: int
    on_gpu: bool
    """Whether a GPU decodes."""
    reason: str


def choose_loading(resources: ResourceConfig, rates: LoadingRates, cores: int, *, has_gpu: bool) -> Loading:
    """Threads as the recipe says, or as many as the rates ask for and this worker's `cores` allow; with `decode` =
    "auto" a GPU decodes where these threads cannot keep up."""
    needed = max(1, math.ceil(_MARGIN * rates.decode / rates.score))
    threads = resources.loader_threads or min(needed, max(1, cores - 1))
    on_gpu = has_gpu and (resources.decode == "gpu" or (resources.decode == "auto" and threads < needed))
    if on_gpu and not resources.loader_threads:
        threads = min(threads, _FEEDING_THREADS)
    times = f"a clip takes {1000 * rates.decode:.1f} ms to decode and {1000 * rates.score:.1f} ms to score"
    text = f"clips are read by {threads} threads{', decoded on the GPU' if on_gpu else ''}: {times}"
    if threads < needed and not on_gpu:
        text += f", which {needed} threads would keep up with"
    return Loading(threads=threads, on_gpu=on_gpu, reason=text)


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
