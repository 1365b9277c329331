"""Batches out of a shard set, in exactly the order of contract 2, whatever the machine or the number of threads.

order → place → bytes (cache or ranged read) → digest → JPEGs → frames → view → batch
"""

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from shards.clip_bytes import decode_jpeg, read_tar_members
from shards.index import ClipPlace, Index
from shards.order import batch_slice, epoch_order, num_steps
from shards.packed_video import decode_packed_video
from shards.store import MissingObject, Store, StoreError
from shards.transforms import VIEWS, View, crop_clip, draw_view
from tavlad.clip import BadClip, ClipBatch


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
    num_views: int = 40
    """Views of a clip that the drawn one is among: the first of its own order of the forty."""
    shuffle: bool
    """A new permutation every epoch, or the index's order."""
    num_threads: int = 2
    """Threads that read and decode; with 0 the caller's own does."""
    prefetch_batches: int = 4
    """Batches read ahead: with the cache, what bounds the memory."""
    cache_megabytes: int = 256
    """Packed clips kept in memory over the epochs, so that a small set is read once; 0 for none."""

    def __post_init__(self) -> None:
        for field, low in (("batch_size", 1), ("crop", 1), ("num_threads", 0), ("prefetch_batches", 1)):
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}: choose {low} or more")
        if not 1 <= self.num_views <= len(VIEWS):
            raise ValueError(f"num_views is {self.num_views}: choose 1 to {len(VIEWS)}")
        if self.cache_megabytes < 0:
            raise ValueError(f"cache_megabytes is {self.cache_megabytes}: choose 0 (no cache) or more")


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
    ) -> None:
        assert 0 <= rank < world, (rank, world)
        self.clips = index.clips(split, part)
        self.options = options
        self._num_frames = index.num_frames
        self._store = store
        self._rank, self._world = rank, world
        self._cache = _Cache(options.cache_megabytes * 1_000_000)

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
        waiting: deque[tuple[int, Int64[np.ndarray, " B"], list[Callable[[], Tensor]]]] = deque()
        with _Workers(self.options.num_threads) as workers:
            while True:
                # Keep `prefetch_batches` batches under way.
                while len(waiting) < self.options.prefetch_batches and (step := next(steps, None)) is not None:
                    rows_B = batch_slice(order_N, self.options.batch_size, step, self._rank, self._world)
                    waiting.append((step, rows_B, [workers.start(self.read_clip, int(row), epoch) for row in rows_B]))
                if not waiting:
                    return
                step, rows_B, clips = waiting.popleft()
                yield self._batch(step, rows_B, [clip() for clip in clips])

    def read_clip(self, row: int, epoch: int) -> UInt8[Tensor, "T 3 H W"]:
        """One clip of the part, as the epoch's batch holds it."""
        options = self.options
        key = self.clips.key(row)
        return self.read_view(row, draw_view(options.seed, epoch, key, options.num_views) if options.augment else None)

    def read_view(self, row: int, view: View | None) -> UInt8[Tensor, "T 3 H W"]:
        """One clip of the part in a view, or in the centre one."""
        place = self.clips.place(row)
        # → the clip's bytes, from memory or by a ranged read, with the digest they were packed with
        members = self._cache.get(row)
        if members is None:
            members = _fetch(self._store, place)
            self._cache.put(row, members)
        # → T frames as packed
        frames_TCHW = decode_frames(members)
        if len(frames_TCHW) != self._num_frames:
            count = f"{len(frames_TCHW)} frames instead of {self._num_frames}"
            raise BadClip(f"{_named(self._store, place)} has {count}: pack the set again")
        # → the square that the model sees
        return crop_clip(frames_TCHW, view, self.options.crop)

    def rows(self, epoch: int, start_step: int = 0) -> Iterator[tuple[int, Int64[np.ndarray, " B"]]]:
        """This rank's clips of each global batch of an epoch, from a step on."""
        order_N = self._order(epoch)
        for step in range(start_step, self.num_steps):
            yield step, batch_slice(order_N, self.options.batch_size, step, self._rank, self._world)

    def _order(self, epoch: int) -> Int64[np.ndarray, " N"]:
        if not self.options.shuffle:
            return np.arange(len(self.clips), dtype=np.int64)
        return epoch_order(len(self.clips), self.options.seed, epoch)

    def size_of_batch(self, step: int) -> int:
        """Clips of a global batch."""
        return min(self.options.batch_size, len(self.clips) - step * self.options.batch_size)

    def _batch(self, step: int, rows_B: Int64[np.ndarray, " B"], clips: Sequence[Tensor]) -> ClipBatch:
        crop = self.options.crop
        empty = torch.empty((0, self._num_frames, 3, crop, crop), dtype=torch.uint8)
        return ClipBatch(
            frames_BTCHW=_stacked(clips) if clips else empty,
            labels_B=torch.from_numpy(self.clips.labels_N[rows_B]),
            keys=tuple(self.clips.keys(rows_B)),
            num_clips_in_global_batch=self.size_of_batch(step),
        )


def decode_frames(members: bytes) -> UInt8[Tensor, "T 3 H W"]:
    """The frames of a packed clip, whose first member is its json. In memory the channels come last."""
    facts, *files = read_tar_members(members)
    frames_TCHW = decode_packed_video(json.loads(bytes(facts)), files[0])
    return _stacked([decode_jpeg(jpeg) for jpeg in files]) if frames_TCHW is None else frames_TCHW


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Like torch.stack, and keeps the decoder's layout, channels last: ten times as fast here, in cropping and in
    convolutions' own preparations."""
    return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


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
    if hashlib.sha256(members).hexdigest() != place.sha256:
        raise BadClip(f"{_named(store, place)} is not what was packed (its digest differs): {_REMEDY}")
    return members


_REMEDY = "run tavlad verify to see what else is damaged, and pack the set again with tavlad pack --repair"


def _named(store: Store, place: ClipPlace) -> str:
    return f"clip {place.key} in {store.uri}/{place.shard}"


class _Cache:
    """Packed clips by row, up to a size. It never evicts: an epoch visits all clips, so what is in it stays useful."""

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._clips: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def get(self, row: int) -> bytes | None:
        return self._clips.get(row)

    def put(self, row: int, members: bytes) -> None:
        with self._lock:
            if row not in self._clips and len(members) <= self._room:
                self._clips[row] = members
                self._room -= len(members)


class _Workers:
    """Threads that read clips; leaving the block drops what has not begun and waits for what has."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "read-clips") if num_threads else None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, read: Callable[[int, int], Tensor], row: int, epoch: int) -> Callable[[], Tensor]:
        """What waits for the clip, or without threads reads it only then: so an error comes at the clip's place."""
        return partial(read, row, epoch) if self._pool is None else self._pool.submit(read, row, epoch).result
