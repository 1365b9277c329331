"""Reads a shard set again from end to end and tells what is wrong with it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from shards.clip_bytes import END_OF_SHARD, read_tar_members
from shards.index import INDEX_PATH, NUM_SPLITS, REJECTED_PATH, Index, load_index, make_index, read_table
from shards.store import MissingObject, Store, StoreError
from tavlad.errors import UserError

_SAID_TWICE = ("key", "action", "label", "group", "source", "num_source_frames", "source_fps", "width", "height")
"""Columns of the index that a clip's own json repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing wrong with a set."""

    shard: str
    """Or another object of the set: index.parquet, rejected.parquet."""
    key: str
    """Of the clip; empty if the whole object is meant."""
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'clip {self.key} ' if self.key else ''}{self.what}"


def verify(store: Store, num_threads: int = 8) -> list[Problem]:
    """Compares every clip of the set with its digest in the index; an empty list means that the set is whole.

    Raises ValueError if there is no finished set, and the store's own errors if the store does not answer.
    """
    index, problems = verify_index(store)
    for shard, rows in rows_by_shard(index):
        problems += verify_shard(store, shard, rows, num_threads)
    return problems


def verify_index(store: Store) -> tuple[Index, list[Problem]]:
    """The index, and what is wrong with the set before any clip is looked at."""
    index = load_index(store)
    problems: list[Problem] = []
    again = make_index(
        name=index.name,
        actions=index.actions,
        packing=index.packing,
        num_frames=index.num_frames,
        plan=index.plan,
        rows=index.clips_table.table,
    )
    if again.fingerprint != index.fingerprint:
        problems.append(Problem(shard=INDEX_PATH, key="", what="is not what packing wrote: its fingerprint differs"))
    problems += _problems_with_rejected(index, store)
    known = set(index.clips_table.table["shard"].unique().to_pylist())
    for path in store.list("shards/"):
        # A shard all of whose videos were rejected is nothing but the mark of its end.
        if path not in known and store.size(path) != len(END_OF_SHARD):
            problems.append(Problem(shard=path, key="", what="is not part of the set"))
    return index, problems


def rows_by_shard(index: Index) -> Iterator[tuple[str, pa.Table]]:
    """Each shard and the index's rows of its clips."""
    table = index.clips_table.table
    encoded = table["shard"].combine_chunks().dictionary_encode()
    codes_N = encoded.indices.to_numpy()
    order_N = np.argsort(codes_N, kind="stable")
    starts = np.searchsorted(codes_N[order_N], np.arange(len(encoded.dictionary) + 1))
    for number, shard in enumerate(encoded.dictionary.to_pylist()):
        yield shard, table.take(pa.array(order_N[starts[number] : starts[number + 1]]))


def verify_shard(
    store: Store,
    shard: str,
    rows: pa.Table,
    num_threads: int = 8,
    advance: Callable[[int], object] = lambda num_done: None,
) -> list[Problem]:
    """What is wrong with a shard, whose clips are these rows of the index; `advance` is told of each clip."""
    try:
        size = store.size(shard)
    except MissingObject:
        return [Problem(shard=shard, key="", what="is missing")]
    problems: list[Problem] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for num_done, problem in enumerate(pool.map(partial(_check, store), rows.to_pylist()), start=1):
            problems += [problem] if problem is not None else []
            advance(num_done)
    return problems or _problems_with_end(store, shard, rows, size)


def _check(store: Store, row: dict[str, Any]) -> Problem | None:
    shard, key = row["shard"], row["key"]
    try:
        members = store.read_range(shard, row["offset"], row["length"])
    except MissingObject:
        return Problem(shard=shard, key=key, what="is missing: its shard has just vanished")
    except StoreError as error:
        if type(error) is not StoreError:  # the store does not answer, or not us
            raise
        return Problem(shard=shard, key=key, what="cannot be read: the shard is truncated")
    if hashlib.sha256(members).hexdigest() != row["sha256"]:
        return Problem(shard=shard, key=key, what="is not what was packed: its digest differs")
    facts = json.loads(bytes(read_tar_members(members)[0]))
    said = {name: row[name] for name in _SAID_TWICE} | {"splits": [row[f"split{k + 1}"] for k in range(NUM_SPLITS)]}
    for name, value in said.items():
        if facts[name] != value:
            return Problem(shard=INDEX_PATH, key=key, what=f"has {name} {value!r} here, and {facts[name]!r} in {shard}")
    return None


def _problems_with_end(store: Store, shard: str, rows: pa.Table, size: int) -> list[Problem]:
    """Behind its clips, which are whole, a shard has the mark that ends a tar file, and nothing more."""
    end = max(row["offset"] + row["length"] for row in rows.select(["offset", "length"]).to_pylist())
    if size != end + len(END_OF_SHARD):
        return [Problem(shard=shard, key="", what=f"has {size} bytes instead of {end + len(END_OF_SHARD)}")]
    if store.read_range(shard, end, len(END_OF_SHARD)) != END_OF_SHARD:
        return [Problem(shard=shard, key="", what="does not end like a tar file")]
    return []


def _problems_with_rejected(index: Index, store: Store) -> list[Problem]:
    try:
        _, described = read_table(store, REJECTED_PATH)
    except MissingObject:
        return [Problem(shard=REJECTED_PATH, key="", what="is missing")]
    except StoreError:
        raise
    except UserError:
        return [Problem(shard=REJECTED_PATH, key="", what="is not a Parquet file")]
    if described.get("plan") != index.plan:
        what = f"is of another set than {REJECTED_PATH}: one of them does not belong here"
        return [Problem(shard=INDEX_PATH, key="", what=what)]
    return []
