"""Clips fetched together with their neighbours in the shard, while a node's cache fills.

A request costs a store and us more than a clip's bytes do. Where a clip is not in the cache, one request brings what
lies beside it too, as far as the same epoch of the same reader will need it: later, from the cache. What is kept there
is proved by its digest whenever it is read.
"""

import threading
from collections import defaultdict

import numpy as np
from jaxtyping import Bool

from shards.disk_cache import DiskCache
from shards.index import ClipPlace, ClipTable
from shards.store import Store, StoreError, StoreUnreachable

_RUN_BYTES = 2 << 20  # the clips that begin in the same so many bytes of a shard come together
_GAP_BYTES = 512 << 10  # so much that nobody wants is read over rather than asked around


class Neighbours:
    """Fetches for one epoch of one reader; of many threads."""

    def __init__(self, clips: ClipTable, store: Store, cache: DiskCache, wanted_N: Bool[np.ndarray, " N"]) -> None:
        """`wanted_N`: the clips that the reader will need in this epoch."""
        self._clips, self._store, self._cache, self._wanted_N = clips, store, cache, wanted_N
        self._lock = threading.Lock()
        self._fetching: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)

    def fetch(self, row: int, place: ClipPlace) -> bytes | None:
        """The bytes of a clip that was not in the cache, unproved; its neighbours are in the cache afterwards.

        None if it has none to be fetched with, if the cache takes nothing, or if the store does not give them: then
        the clip is to be fetched alone, which also explains what is wrong. `StoreUnreachable` if nothing answers.
        """
        if not self._cache.takes_more:
            return None
        run = _run_of(place)
        with self._lock:
            being_fetched = self._fetching[run]
        with being_fetched:
            try:
                members = self._cache.get(place.sha256)  # whoever was waited for has brought it
                return self._fetch_run(row, place) if members is None and self._cache.takes_more else members
            finally:
                with self._lock:
                    self._fetching.pop(run, None)

    def _fetch_run(self, row: int, place: ClipPlace) -> bytes | None:
        places = self._run(row, place)
        if len(places) == 1:
            return None
        start = places[0].offset
        try:
            data = memoryview(self._store.read_range(place.shard, start, places[-1].offset + places[-1].length - start))
        except StoreUnreachable:  # it was waited for long enough
            raise
        except StoreError:
            return None
        for each in places:
            self._cache.put(each.sha256, data[each.offset - start : each.offset - start + each.length])
        return bytes(data[place.offset - start : place.offset - start + place.length])

    def _run(self, row: int, place: ClipPlace) -> list[ClipPlace]:
        """What is fetched with the clip, in the shard's order: what is wanted, absent, and no gap away."""
        before, after = self._beside(row, place, -1), self._beside(row, place, 1)
        places = [*before[::-1], place, *after]
        first = last = len(before)
        while first > 0 and 0 <= _gap(places[first - 1], places[first]) <= _GAP_BYTES:
            first -= 1
        while last + 1 < len(places) and 0 <= _gap(places[last], places[last + 1]) <= _GAP_BYTES:
            last += 1
        return places[first : last + 1]

    def _beside(self, row: int, place: ClipPlace, step: int) -> list[ClipPlace]:
        """Those to one side of the clip."""
        found: list[ClipPlace] = []
        row += step
        while 0 <= row < len(self._clips) and _run_of(beside := self._clips.place(row)) == _run_of(place):
            if self._wanted_N[row] and not self._cache.has(beside.sha256):
                found.append(beside)
            row += step
        return found


def _run_of(place: ClipPlace) -> tuple[str, int]:
    return place.shard, place.offset // _RUN_BYTES


def _gap(place: ClipPlace, following: ClipPlace) -> int:
    """Bytes between two clips of a shard; negative if they are not in its order."""
    return following.offset - place.offset - place.length
