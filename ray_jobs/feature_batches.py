"""Batches of features instead of frames: read where they are there, else computed, and written for the next time."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from shards.disk_cache import DiskCache
from shards.features import CENTRE_SLOT, Entry, FeatureSet, FeatureTable
from shards.read import ClipLoader
from shards.read_ahead import read_ahead
from shards.transforms import draw_slot, views_of
from tavlad.clip import FeatureBatch, Features

Compute = Callable[[UInt8[Tensor, "B T 3 H W"]], Features]


class FeatureBatches:
    """The batches of a `ClipLoader`, after the trunk, or after the part of it that is frozen.

    What is computed on the way is rounded as it is stored, so a batch does not depend on what was there already.
    """

    def __init__(
        self, loader: ClipLoader, features: FeatureSet, split: int, compute: Compute, cache: DiskCache | None = None
    ) -> None:
        """`compute` runs what is frozen; `cache` is where this node keeps what it has read."""
        self._loader = loader
        self._features = features
        self._split = split
        self._compute = compute
        self._cache = cache
        self._table: FeatureTable | None = None
        self.num_computed = 0
        """Clips that had to go through the trunk so far, on this rank."""

    @property
    def num_steps(self) -> int:
        """Batches of an epoch."""
        return self._loader.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        """The batches of an epoch from a step on; at its end, everything computed in it is there for others."""
        options = self._loader.options
        through = self._features.through()
        steps = list(self._loader.rows(epoch, start_step))
        wanted = [(row, self._slot(row, epoch)) for _, rows_B in steps for row in rows_B.tolist()]
        table = self._table_of(wanted)
        found = read_ahead(
            lambda item: self._read(table, *item),
            wanted,
            max(1, options.num_threads),
            max(1, options.prefetch_batches * max(len(rows_B) for _, rows_B in steps)) if steps else 1,
        )
        slots = iter(slot for _, slot in wanted)
        for step, rows_B in steps:
            keys = tuple(self._loader.clips.keys(rows_B))
            read = [next(found) for _ in keys]
            slots_B = [next(slots) for _ in keys]
            entries = self._complete(read)
            for key, slot, was_read, entry in zip(keys, slots_B, read, entries, strict=True):
                if isinstance(was_read, Tensor):
                    through.add(key, slot, entry)
            yield FeatureBatch(
                features=self._stacked(entries),
                labels_B=torch.from_numpy(self._loader.clips.labels_N[rows_B]),
                keys=keys,
                num_clips_in_global_batch=self._loader.size_of_batch(step),
            )
        through.flush()

    def _table_of(self, wanted: list[tuple[int, int]]) -> FeatureTable:
        """Where everything is; asked for again only when something wanted was not there before."""
        if self._table is None or any(self._table.present[item] < 0 for item in wanted):
            options = self._loader.options
            self._table = FeatureTable(self._loader.clips, self._features.found(self._split, options.num_views))
        return self._table

    def _slot(self, row: int, epoch: int) -> int:
        options = self._loader.options
        if not options.augment:
            return CENTRE_SLOT
        return draw_slot(options.seed, epoch, self._loader.clips.key(row), options.num_views)

    def _read(self, table: FeatureTable, row: int, slot: int) -> Entry | Tensor:
        """The stored features of a clip, or else its frames."""
        place = table.place(row, slot)
        if place is not None:
            return self._features.read(place, self._cache)
        key = self._loader.clips.key(row)
        return self._loader.read_view(row, None if slot == CENTRE_SLOT else views_of(key)[slot])

    def _complete(self, read: list[Entry | Tensor]) -> list[Entry]:
        """The entries of a batch, those that were not there computed together."""
        frames = [each for each in read if isinstance(each, Tensor)]
        computed = iter(entries_of(self._compute(torch.stack(frames)), self._features.dtype) if frames else ())
        self.num_computed += len(frames)
        return [next(computed) if isinstance(each, Tensor) else each for each in read]

    def _stacked(self, entries: list[Entry]) -> Features:
        if not entries:
            features = self._features
            return Features(torch.empty(0, *features.shape), torch.empty(0, *features.activation_shape), features.kind)
        activations = [entry.activation_THW for entry in entries if entry.activation_THW is not None]
        return Features(
            torch.from_numpy(np.stack([entry.map_TDHW for entry in entries])),
            torch.from_numpy(np.stack(activations)) if activations else None,
            self._features.kind,
        )


def entries_of(features: Features, dtype: np.dtype) -> Iterator[Entry]:
    """A batch's features as they are stored. ValueError where a value is beyond the range of `dtype`."""
    maps = features.maps_BTDHW.float().cpu().numpy()
    activations = None if features.activation_BTHW is None else features.activation_BTHW.float().cpu().numpy()
    if np.abs(maps).max(initial=0.0) > np.finfo(dtype).max:
        raise ValueError(
            f'the trunk\'s features do not fit into {dtype}: set features.dtype = "float32", or train from frames '
            '(the stage\'s features = "never")'
        )
    for row, map_TDHW in enumerate(maps.astype(dtype)):
        yield Entry(map_TDHW, None if activations is None else activations[row])
