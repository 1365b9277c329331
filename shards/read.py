"""Batches out of a shard set, in exactly the order of contract 2, whatever the machine or the number of threads.

order → place → bytes (node's cache or ranged read) → digest → JPEGs → crop → frames → view, in its slot of the batch

A worker does a whole clip, frame by frame, so that a frame is still in the processor's cache when it is resized.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from threadpoolctl import ThreadpoolController
from torch import Tensor

from shards.batch_memory import BatchMemory
from shards.clip_bytes import decode_jpeg, read_tar_members
from shards.clip_view import decode_window
from shards.disk_cache import DiskCache
from shards.gpu_decode import GpuDecoder, Wanted
from shards.index import ClipPlace, Index
from shards.jpeg_crop import JpegCrop, JpegHeader
from shards.neighbours import Neighbours
from shards.order import batch_slice, epoch_order, num_steps
from shards.packed_video import decode_packed_video
from shards.store import MissingObject, Store, StoreError
from shards.transforms import (
    VIEWS,
    TsnView,
    View,
    ViewPolicy,
    crop_clip,
    draw_tsn_view,
    draw_view,
    window_of,
)
from tavlad.clip import BadClip, ClipBatch, reverse_flow

_Result = TypeVar("_Result")
_FETCHES_A_THREAD = 4
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """How a split is read."""

    batch_size: int
    """Clips in a global batch, over all ranks."""
    seed: int
    """Of the order and of the views."""
    crop: int = 224
    """Side in pixels of the frames given out."""
    augment: bool
    """Each clip in a view drawn for the epoch, or all in the centre view."""
    views: ViewPolicy = "corner-scale"
    """What is drawn from: the forty views, or TSN's 260."""
    num_views: int = len(VIEWS)
    """Of the forty, how many a clip is shown in: the first of its own order of them."""
    shuffle: bool
    """A new permutation every epoch, or the index's order."""
    num_threads: int = 2
    """Threads that decode, with some that fetch for them; with 0 the caller's own does both."""
    prefetch_batches: int = 4
    """Batches read ahead: what bounds the memory."""
    pin_memory: bool = False
    """Batches in page-locked memory, for copies to a GPU."""
    gpu: torch.device | None = None
    """The GPU that makes the views and holds the batches; None: CPUs do."""
    keep_decoded: bool = False
    """Clips are decoded once, by CPUs, and stay in that GPU's memory: the same pixels. Else nvJPEG decodes them there
    each time, to other pixels."""

    def __post_init__(self) -> None:
        for field, low in (("batch_size", 1), ("crop", 1), ("num_threads", 0), ("prefetch_batches", 1)):
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}: choose {low} or more")
        if not 1 <= self.num_views <= len(VIEWS):
            raise ValueError(f"num_views is {self.num_views}: choose 1 to {len(VIEWS)}")


class ClipLoader:
    """One rank's share of the batches of one part of a split."""

    def __init__(
        self,
        index: Index,
        store: Store,
        split: int,
        part: Literal["train", "test", "all"],
        options: LoaderOptions,
        rank: int = 0,
        world: int = 1,
        cache: DiskCache | None = None,
        num_ranks: int = 1,
    ) -> None:
        """`cache` is where this node keeps clips over the epochs; without it every epoch reads them from the store.
        `num_ranks`: this reader takes the shares of so many ranks, from `rank` on."""
        assert 0 <= rank < rank + num_ranks <= world, (rank, num_ranks, world)
        self.clips = index.clips(split, part)
        self.options = options
        self._num_frames = index.num_frames
        self._is_flow = index.modality == "flow"
        self._store = store
        self._rank, self._world, self._num_ranks = rank, world, num_ranks
        self._cache = cache
        self._gpu = GpuDecoder(options.gpu) if options.gpu is not None else None
        self._memory = self._gpu or BatchMemory(pin=options.pin_memory)

    @property
    def num_clips(self) -> int:
        """Clips in an epoch, over all ranks."""
        return len(self.clips)

    @property
    def num_steps(self) -> int:
        """Batches in an epoch, the short one at the end included; the same on every rank."""
        return num_steps(len(self.clips), self.options.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ClipBatch]:
        """The batches of an epoch from `start_step` on: what an uninterrupted epoch would have given from there.

        Raises `BadClip` for a clip that is not what was packed, at its place in the order. Threads end with the
        iteration, however it ends.
        """
        order_N = self._order(epoch)
        steps = iter(range(start_step, self.num_steps))
        neighbours = self._neighbours(epoch, start_step)
        waiting: deque[tuple[ClipBatch, list[Callable[[], None]]]] = deque()
        num_threads = self.options.num_threads
        # Fetching waits for the network, decoding for a processor: of each there are as many as it takes.
        with _Workers(num_threads * _FETCHES_A_THREAD) as fetchers, _Workers(num_threads) as workers:
            while True:
                # Keep `prefetch_batches` batches under way.
                while len(waiting) < self.options.prefetch_batches and (step := next(steps, None)) is not None:
                    rows_B = self._share(order_N, step)
                    batch = self._empty_batch(step, rows_B)
                    reads: list[Callable[[], None]] = []
                    held: list[Wanted] = []
                    for row, slot in zip(rows_B, batch.frames_BTCHW, strict=True):
                        place = self.clips.place(int(row))
                        view = self._view(place.key, epoch)
                        if self._gpu is not None and self._gpu.keeps(place.key):
                            held.append((place.key, view, slot))
                            continue
                        members = fetchers.start(partial(self._members, place, int(row), neighbours))
                        reads.append(workers.start(partial(self._fill, place, view, slot, members)))
                    if held:
                        reads.append(workers.start(partial(self._show, held)))
                    waiting.append((batch, reads))
                if not waiting:
                    return
                batch, reads = waiting.popleft()
                for is_read in reads:
                    is_read()
                yield batch
                del batch, reads  # its memory is the consumer's alone

    def read_clip(self, row: int, epoch: int) -> UInt8[Tensor, "T 3 H W"]:
        """One clip of the part, as the epoch's batch holds it."""
        slot_TCHW = self._memory.take(1, self._num_frames, self.options.crop)[0]
        place = self.clips.place(row)
        self._fill(place, self._view(place.key, epoch), slot_TCHW, partial(self._members, place))
        return slot_TCHW

    def read_view(self, row: int, view: View | None) -> UInt8[Tensor, "T 3 H W"]:
        """One clip of the part in a view, or in the centre one."""
        slot_TCHW = self._memory.take(1, self._num_frames, self.options.crop)[0]
        place = self.clips.place(row)
        self._fill(place, view, slot_TCHW, partial(self._members, place))
        return slot_TCHW

    def _members(self, place: ClipPlace, row: int = -1, neighbours: Neighbours | None = None) -> bytes:
        """The clip's bytes, from this node's disk or by a ranged read, with the digest they were packed with."""
        if self._cache is None:
            return _fetch(self._store, place)
        members = self._cache.get(place.sha256)
        if members is None and neighbours is not None:
            members = neighbours.fetch(row, place)
            if members is not None and not _is_packed(members, place):
                members = None
        if members is None:
            members = _fetch(self._store, place)
            self._cache.put(place.sha256, members)
        return members

    def _neighbours(self, epoch: int, start_step: int) -> Neighbours | None:
        if self._cache is None:
            return None
        wanted_N = np.zeros(len(self.clips), dtype=np.bool_)
        for _, rows_B in self.rows(epoch, start_step):
            wanted_N[rows_B] = True
        return Neighbours(self.clips, self._store, self._cache, wanted_N)

    def _fill(
        self, place: ClipPlace, view: View | TsnView | None, slot_TCHW: Tensor, fetched: Callable[[], bytes]
    ) -> None:
        """Writes the view of each of a clip's frames to its place in the batch."""
        members = fetched()
        contents = read_tar_members(members)[1:]
        if self._gpu is not None and self.options.keep_decoded:
            frames_TCHW = decode_frames(members)
            self._check_count(place, len(frames_TCHW))
            self._gpu.keep(place.key, frames_TCHW)
            self._show([(place.key, view, slot_TCHW)])
            return
        if contents and bytes(contents[0][: len(_JPEG)]) == _JPEG:
            self._check_count(place, len(contents))
            (self._gpu.fill if self._gpu is not None else _decode_view)(contents, view, slot_TCHW)
        else:
            frames_TCHW = decode_frames(members)
            self._check_count(place, len(frames_TCHW))
            slot_TCHW.copy_(crop_clip(frames_TCHW, view, self.options.crop))
        self._turn_flow(view, slot_TCHW)

    def _show(self, held: Sequence[Wanted]) -> None:
        """Views of clips that stay on the GPU, into their slots."""
        assert self._gpu is not None
        self._gpu.show(held)
        for _, view, slot_TCHW in held:
            self._turn_flow(view, slot_TCHW)

    def _turn_flow(self, view: View | TsnView | None, slot_TCHW: Tensor) -> None:
        if self._is_flow and view is not None and view.flip:
            reverse_flow(slot_TCHW)

    def _check_count(self, place: ClipPlace, num_frames: int) -> None:
        if num_frames != self._num_frames:
            count = f"{num_frames} frames instead of {self._num_frames}"
            raise BadClip(f"{_named(self._store, place)} has {count}: pack the set again")

    def _view(self, key: str, epoch: int) -> View | TsnView | None:
        options = self.options
        if not options.augment:
            return None
        if options.views == "tsn":
            return draw_tsn_view(options.seed, epoch, key)
        return draw_view(options.seed, epoch, key, options.num_views)

    def rows(self, epoch: int, start_step: int = 0) -> Iterator[tuple[int, Int64[np.ndarray, " B"]]]:
        """This rank's clips of each global batch of an epoch, from a step on."""
        order_N = self._order(epoch)
        for step in range(start_step, self.num_steps):
            yield step, self._share(order_N, step)

    def _share(self, order_N: Int64[np.ndarray, " N"], step: int) -> Int64[np.ndarray, " B"]:
        return batch_slice(order_N, self.options.batch_size, step, self._rank, self._world, self._num_ranks)

    def _order(self, epoch: int) -> Int64[np.ndarray, " N"]:
        if not self.options.shuffle:
            return np.arange(len(self.clips), dtype=np.int64)
        return epoch_order(len(self.clips), self.options.seed, epoch)

    def size_of_batch(self, step: int) -> int:
        """Clips of a global batch."""
        return min(self.options.batch_size, len(self.clips) - step * self.options.batch_size)

    def _empty_batch(self, step: int, rows_B: Int64[np.ndarray, " B"]) -> ClipBatch:
        return ClipBatch(
            frames_BTCHW=self._memory.take(len(rows_B), self._num_frames, self.options.crop),
            labels_B=torch.from_numpy(self.clips.labels_N[rows_B]),
            keys=tuple(self.clips.keys(rows_B)),
            num_clips_in_global_batch=self.size_of_batch(step),
        )


def decode_frames(members: bytes) -> UInt8[Tensor, "T 3 H W"]:
    """The frames of a packed clip, whose first member is its json. In memory the channels come last."""
    facts, *files = read_tar_members(members)
    frames_TCHW = decode_packed_video(json.loads(bytes(facts)), files[0])
    if frames_TCHW is not None:
        return frames_TCHW
    images = [decode_jpeg(jpeg) for jpeg in files]
    # In the decoder's layout, channels last: ten times as fast here, in cropping and in convolutions' preparations.
    return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


def _decode_view(jpegs: Sequence[memoryview], view: View | TsnView | None, slot_TCHW: Tensor) -> None:
    """The view of each frame into its slot; only the part of a JPEG that shows it is decoded, if the JPEG has parts."""
    start = 0
    while start < len(jpegs):
        header = JpegHeader.of(jpegs[start])
        stop = start + 1
        while stop < len(jpegs) and header.begins(jpegs[stop]):  # as all frames of a clip do
            stop += 1
        window = window_of(view, header.height, header.width, slot_TCHW.shape[-1])
        crop = JpegCrop(header, *window[:4])
        data, lengths = crop.crop(jpegs[start:stop])
        top, left = window.top - crop.top, window.left - crop.left
        jpegs_N = torch.frombuffer(data, dtype=torch.uint8)
        decode_window(jpegs_N, lengths, top, left, *window[2:], slot_TCHW[start:stop])
        start = stop


def _fetch(store: Store, place: ClipPlace) -> bytes:
    """The clip's bytes, proved by their digest. Trouble on the way to the store stays a `StoreError` of its own."""
    try:
        members = store.read_range(place.shard, place.offset, place.length)
    except MissingObject as error:
        raise BadClip(f"{_named(store, place)} cannot be read, the shard is missing: {_REMEDY}") from error
    except StoreError as error:
        if type(error) is not StoreError:
            raise
        raise BadClip(f"{_named(store, place)} cannot be read ({error}): {_REMEDY}") from error
    if not _is_packed(members, place):
        raise BadClip(f"{_named(store, place)} is not what was packed (its digest differs): {_REMEDY}")
    return members


def _is_packed(members: bytes, place: ClipPlace) -> bool:
    return hashlib.sha256(members).hexdigest() == place.sha256


_REMEDY = "run tavlad verify to see what else is damaged, and pack the set again with tavlad pack --repair"


def _named(store: Store, place: ClipPlace) -> str:
    return f"clip {place.key} in {store.uri}/{place.shard}"


class _Workers:
    """Threads that read clips; leaving the block drops what has not begun and waits for what has."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "read-clips", _compute_alone) if num_threads else None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, work: Callable[[], _Result]) -> Callable[[], _Result]:
        """What waits for the work, or without threads does it only then: so an error comes at the clip's place."""
        return work if self._pool is None else self._pool.submit(work).result


def _compute_alone() -> None:
    """Keeps the operators called by this thread in this thread: each would otherwise have helpers of its own, that
    wait for work by spinning.

    Not by `torch.set_num_threads`, which sets the number of every thread born later too.
    """
    torch.get_num_threads()  # PyTorch sets a thread's number once, at its first use of it
    _openmp().limit(limits=1)


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")
