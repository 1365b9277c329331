"""Mends a finished set from its source videos: a shard is replaced only by the very bytes that the index describes."""

from collections.abc import Collection
from functools import partial

import pyarrow as pa

from shards.clip_packing import reason_to_reject
from shards.index import INDEX_PATH, REJECTED_PATH, Index, load_index, read_table
from shards.pack import Advance, finished_set, shard_path, write_rejected, write_shard
from shards.patience import outlast
from shards.plan import PackPlan
from shards.scratch import scratch
from shards.store import MissingObject, Store, StoreError
from tavlad.errors import UserError


def index_to_keep(plan: PackPlan, store: Store) -> Index | None:
    """The index at `store` if it is this plan's; None if this plan's set has lost it, and all must be packed again.

    The set has lost its index if none is there, or a foreign or unreadable one beside this plan's rejected.parquet.
    Raises ValueError if what is there is not known to be this plan's.
    """
    if not store.exists(INDEX_PATH):
        return None
    try:
        index = load_index(store)
    except StoreError:
        raise
    except UserError:
        index = None
    if index is not None and index.plan == plan.fingerprint:
        return index
    if _plan_of_rejected(store) == plan.fingerprint:
        return None
    finished_set(plan, store)
    raise AssertionError("finished_set raises for an index of another plan")


def repair_shard(
    plan: PackPlan, number: int, rows: pa.Table, store: Store, *, num_threads: int, advance: Advance
) -> None:
    """Packs a shard again and puts it in its place, if its clips come out as `rows`, the index's, say.

    Raises ValueError, and changes nothing, if they do not: then it is the decoder or the JPEG library that differs,
    since the plan holds the digests of the sources.
    """
    with scratch() as folder:
        local = folder / "shard.tar"
        packed, _ = write_shard(plan, number, local, num_threads=num_threads, advance=advance)
        if packed.replace_schema_metadata(None) != rows.replace_schema_metadata(None):
            raise UserError(
                f"{shard_path(number)} comes out otherwise than it was packed ({_first_difference(packed, rows)}): use "
                "the versions of PyAV and torchvision that packed it, or pack the set under another name"
            )
        told = partial(advance, len(plan.shards[number]))
        outlast(lambda: store.upload(local, shard_path(number)), told=told)


def repair_rejected(plan: PackPlan, index: Index, store: Store) -> None:
    """Writes rejected.parquet again: the planned videos that the index does not have, and why."""
    packed = set(index.clips_table.keys())
    absent = [clip for shard in plan.shards for clip in shard if clip.key not in packed]
    reasons = [reason_to_reject(plan, clip) for clip in absent]
    if None in reasons:
        name = absent[reasons.index(None)].video.name
        raise UserError(
            f"{name} can be packed now, and could not be when the set was: use the version of PyAV that packed it, or "
            "pack the set under another name"
        )
    write_rejected(plan, sorted(row for row in reasons if row is not None), store)


def numbers_of(plan: PackPlan, shards: Collection[str]) -> list[int]:
    """The numbers of these shards; those that the plan does not know are left out."""
    return [number for number in range(len(plan.shards)) if shard_path(number) in shards]


def _plan_of_rejected(store: Store) -> str | None:
    try:
        return read_table(store, REJECTED_PATH)[1].get("plan")
    except MissingObject:
        return None
    except StoreError:
        raise
    except UserError:
        return None


def _first_difference(packed: pa.Table, rows: pa.Table) -> str:
    here, there = packed["key"].to_pylist(), rows["key"].to_pylist()
    for position, key in enumerate(there):
        if here[position : position + 1] != [key]:
            return f"clip {key} is not in its place"
        for name in rows.column_names:
            if packed[name][position] != rows[name][position]:
                return f"clip {key} has another {name}"
    return f"it has {len(here)} clips instead of {len(there)}"
