"""Reads a shard set again from end to end and tells what is wrong with it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from shards.index import ClipPlace, load_index
from shards.store import MissingObject, Store, StoreError

_CLIPS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing wrong with a set."""

    shard: str
    key: str
    """Of the clip; empty if the whole shard is meant."""
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'clip {self.key} ' if self.key else ''}{self.what}"


def verify(store: Store, num_threads: int = 8) -> list[Problem]:
    """Compares every clip of the set with its digest in the index; an empty list means that the set is whole.

    Raises ValueError if there is no finished set, and the store's own errors if the store does not answer.
    """
    clips = load_index(store).clips_table
    present = set(store.list("shards/"))
    absent = sorted(set(clips.table["shard"].unique().to_pylist()) - present)
    problems = [Problem(shard=shard, key="", what="is missing") for shard in absent]
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(clips), _CLIPS_AT_ONCE):
            rows = range(start, min(start + _CLIPS_AT_ONCE, len(clips)))
            places = [place for place in map(clips.place, rows) if place.shard in present]
            checked = pool.map(partial(_check, store), places)
            problems += [problem for problem in checked if problem is not None]
    return problems


def _check(store: Store, place: ClipPlace) -> Problem | None:
    try:
        members = store.read_range(place.shard, place.offset, place.length)
    except MissingObject:
        return Problem(shard=place.shard, key=place.key, what="is missing: its shard has just vanished")
    except StoreError as error:
        if type(error) is not StoreError:  # the store does not answer, or not us
            raise
        return Problem(shard=place.shard, key=place.key, what="cannot be read: the shard is truncated")
    if hashlib.sha256(members).hexdigest() != place.sha256:
        return Problem(shard=place.shard, key=place.key, what="is not what was packed: its digest differs")
    return None
