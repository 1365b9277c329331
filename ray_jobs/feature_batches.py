"""Batches of features instead of frames: read where they are there, else computed, and written for the next time."""

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from shards.disk_cache import DiskCache
from shards.features import CENTRE_SLOT, Entry, FeatureSet, FeatureTable
from shards.read import ClipLoader
from shards.read_ahead import read_ahead
from shards.store import MissingObject
from shards.transforms import draw_slot, views_of
from tavlad.clip import FeatureBatch, Features, PooledBatch
from tavlad.config import StageConfig
from tavlad.errors import UserError
from tavlad.model import TaVlad
from tavlad.precision import exact_float32


class Item(NamedTuple):
    """A clip of the loader's part in one of its view slots."""

    row: int
    slot: int


Compute = Callable[[UInt8[Tensor, "B T 3 H W"]], Features]


class FeatureBatches:
    """The batches of a `ClipLoader`, after the trunk, or after the part of it that is frozen.

    What is computed on the way is rounded as it is stored, so a batch does not depend on what was there already.
    """

    def __init__(
        self, loader: ClipLoader, features: FeatureSet, split: int, compute: Compute, cache: DiskCache | None = None
    ) -> None:
        """`compute` runs what is frozen; `cache` is where this node keeps what it has read."""
        self.loader = loader
        """What reads the clips, and says which come when."""
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
        return self.loader.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        """The batches of an epoch from a step on; at its end, everything computed in it is there for others."""
        for step, items, entries in self.steps(epoch, start_step):
            rows_B = np.array([item.row for item in items], dtype=np.int64)
            yield FeatureBatch(
                features=self._stacked([entries[item] for item in items]),
                labels_B=torch.from_numpy(self.loader.clips.labels_N[rows_B]),
                keys=tuple(self.loader.clips.keys(rows_B)),
                num_clips_in_global_batch=self.loader.size_of_batch(step),
            )

    def steps(
        self, epoch: int, start_step: int = 0, known: Container[Item] = ()
    ) -> Iterator[tuple[int, list[Item], dict[Item, Entry]]]:
        """Each step, its clips in order, and the features of those that are not `known`, which is asked beforehand."""
        options = self.loader.options
        through = self._features.through()
        steps = [
            (step, [Item(row, self._slot(row, epoch)) for row in rows_B.tolist()])
            for step, rows_B in self.loader.rows(epoch, start_step)
        ]
        wanted = [[item for item in items if item not in known] for _, items in steps]
        table = self._table_of([item for items in wanted for item in items])
        found = read_ahead(
            lambda item: self._read(table, *item),
            [item for items in wanted for item in items],
            max(1, options.num_threads),
            max(1, options.prefetch_batches * max(map(len, wanted))) if steps else 1,
        )
        for (step, items), missing in zip(steps, wanted, strict=True):
            read = [next(found) for _ in missing]
            entries = dict(zip(missing, self._complete(read), strict=True))
            for item, was_read in zip(missing, read, strict=True):
                if isinstance(was_read, Tensor):
                    through.add(self.loader.clips.key(item.row), item.slot, entries[item])
            yield step, items, entries
        through.flush()

    def _table_of(self, wanted: list[Item]) -> FeatureTable:
        """Where everything is; asked for again only when something wanted was not there before."""
        if self._table is None or any(self._table.present[item] < 0 for item in wanted):
            options = self.loader.options
            self._table = FeatureTable(self.loader.clips, self._features.found(self._split, options.num_views))
        return self._table

    def _slot(self, row: int, epoch: int) -> int:
        options = self.loader.options
        if not options.augment:
            return CENTRE_SLOT
        return draw_slot(options.seed, epoch, self.loader.clips.key(row), options.num_views)

    def _read(self, table: FeatureTable, row: int, slot: int) -> Entry | Tensor:
        """The stored features of a clip, or else its frames."""
        place = table.place(row, slot)
        if place is not None:
            try:
                return self._features.read(place, self._cache)
            except MissingObject:  # it has expired since the table was made
                self._table = None
        key = self.loader.clips.key(row)
        return self.loader.read_view(row, None if slot == CENTRE_SLOT else views_of(key)[slot])

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


class PooledBatches:
    """The batches of a `FeatureBatches`, after all that a stage does not train of a model that can pool.

    What a clip's features come to in a view is kept in this process, up to `max_bytes`, and so computed once.
    """

    def __init__(self, batches: FeatureBatches, model: TaVlad, max_bytes: int = 1_000_000_000) -> None:
        self._batches = batches
        self._model = model
        self._max_bytes = max_bytes
        self._kept: dict[Item, Tensor] = {}

    @property
    def num_steps(self) -> int:
        """Batches of an epoch."""
        return self._batches.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[PooledBatch]:
        """The batches of an epoch from a step on."""
        loader = self._batches.loader
        for step, items, entries in self._batches.steps(epoch, start_step, self._kept):
            # One by one: what a clip comes to must not depend on the clips beside it.
            fresh = {item: self._pool(entry) for item, entry in entries.items()}
            pooled = [fresh[item] if item in fresh else self._kept[item] for item in items]
            for item, clip_KD in fresh.items():
                if (len(self._kept) + 1) * clip_KD.nbytes <= self._max_bytes:
                    self._kept[item] = clip_KD
            rows_B = np.array([item.row for item in items], dtype=np.int64)
            blank = torch.empty(0, *self._model.pooled_shape)
            yield PooledBatch(
                pooled_BKD=torch.stack(pooled) if pooled else blank,
                labels_B=torch.from_numpy(loader.clips.labels_N[rows_B]),
                keys=tuple(loader.clips.keys(rows_B)),
                num_clips_in_global_batch=loader.size_of_batch(step),
            )

    def _pool(self, entry: Entry) -> Tensor:
        activation_1THW = None if entry.activation_THW is None else torch.from_numpy(entry.activation_THW)[None]
        features = Features(torch.from_numpy(entry.map_TDHW)[None], activation_1THW)
        device = self._model.classifier.weight.device
        with exact_float32():
            return self._model.pool(features.to(device))[0].cpu()


def pooled_if_possible(batches: FeatureBatches, model: TaVlad, stage: StageConfig) -> FeatureBatches | PooledBatches:
    """The quickest batches of the same clips for a stage with a frozen trunk."""
    is_pooled = model.config.can_pool and not stage.vlad and stage.feature_kind == "last"
    return PooledBatches(batches, model) if is_pooled else batches


def entries_of(features: Features, dtype: np.dtype) -> Iterator[Entry]:
    """A batch's features as they are stored. ValueError where a value is beyond the range of `dtype`."""
    maps = features.maps_BTDHW.float().cpu().numpy()
    activations = None if features.activation_BTHW is None else features.activation_BTHW.float().cpu().numpy()
    if np.abs(maps).max(initial=0.0) > np.finfo(dtype).max:
        raise UserError(
            f'the trunk\'s features do not fit into {dtype}: set features.dtype = "float32", or train from frames '
            '(the stage\'s features = "never")'
        )
    # In the order in which stored maps are read: what is computed from one must not depend on where it came from.
    for row, map_TDHW in enumerate(maps.astype(dtype, order="C")):
        yield Entry(map_TDHW, None if activations is None else activations[row])
