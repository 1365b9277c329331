"""Reads a shard set again from end to end and tells what is wrong with it."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shards.index import ClipPlace, load_index
from shards.store import MissingObject, Store, StoreError, StoreUnreachable


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
    """Compares every clip of the set with its digest in the index; no problems, no list.

    Raises ValueError if there is no finished set, and the store's own errors if the store does not answer.
    """
    clips = load_index(store).clips_table
    present = set(store.list("shards/"))
    absent = sorted(set(clips.table["shard"].unique().to_pylist()) - present)
    problems = [Problem(shard=shard, key="", what="is missing") for shard in absent]
    places = (place for place in map(clips.place, range(len(clips))) if place.shard in present)
    with ThreadPoolExecutor(num_threads) as pool:
        for found in pool.map(lambda place: list(_check(store, place)), places):
            problems += found
    return problems


def _check(store: Store, place: ClipPlace) -> Iterator[Problem]:
    try:
        members = store.read_range(place.shard, place.offset, place.length)
    except StoreUnreachable:
        raise
    except MissingObject:
        yield Problem(shard=place.shard, key=place.key, what="is missing: the shard vanished meanwhile")
    except StoreError:
        yield Problem(shard=place.shard, key=place.key, what="cannot be read: the shard is truncated")
    else:
        if hashlib.sha256(members).hexdigest() != place.sha256:
            yield Problem(shard=place.shard, key=place.key, what="is not what was packed: its digest differs")
