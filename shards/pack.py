"""Videos become a shard set (contract 1): each shard anywhere, then all of it made visible at once.

The steps know nothing of the cluster that runs them. A shard's bytes are a function of the plan (plan.py), so a shard
packed twice, or by a task that was thought dead, is the same shard; a restarted job finds the parts that are done.
They stand in one long file because each relies on what the one before has written, and in which order.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.clip_bytes import END_OF_SHARD
from shards.clip_packing import Row, pack_clip, printable
from shards.index import (
    INDEX_PATH,
    REJECTED_PATH,
    REJECTED_SCHEMA,
    SCHEMA,
    Index,
    index_bytes,
    load_index,
    make_index,
    read_table,
    rows_where,
    table_bytes,
)
from shards.patience import outlast
from shards.plan import PackPlan, PlannedClip
from shards.scratch import scratch
from shards.store import MissingObject, Store, StoreError
from shards.video import VideoError
from tavlad.errors import UserError

_SHARDS, _PARTS = "shards/", "parts/"

Advance = Callable[[int, str], object]
"""Told how many clips of a shard are done, and what is being waited for."""


def _silent(num_done: int, note: str) -> None:
    del num_done, note


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What became of one shard."""

    number: int
    rows: pa.Table
    """Of its clips, schema of the index."""
    rejected: tuple[tuple[str, str], ...]
    """Path and reason of each video that could not be packed."""
    num_bytes: int
    reused: bool
    """Whether an earlier, interrupted job had packed it."""


def finished_set(plan: PackPlan, store: Store) -> Index | None:
    """The finished set at `store` if it is this plan's, None if there is none; ValueError if it is another's."""
    if not store.exists(INDEX_PATH):
        return None
    index = load_index(store)
    if index.plan != plan.fingerprint:
        raise UserError(
            f"{store.uri} holds the finished set {index.name!r} of plan {index.plan[:12]}, and this is plan "
            f"{plan.fingerprint[:12]}: the videos, splits or options differ; choose another name, or delete that set"
        )
    return index


def kept_shards(plan: PackPlan, store: Store) -> list[ShardResult]:
    """The shards that an earlier, interrupted job has packed, so that only the others need to be."""
    described = [path.removeprefix(_PARTS).removesuffix(".parquet") for path in store.list(_PARTS)]
    numbers = [int(name) for name in described if name.isdecimal() and int(name) < len(plan.shards)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: _kept(plan, number, store), numbers))
    return [result for result in found if result is not None]


def pack_shard(
    plan: PackPlan, number: int, store: Store, *, num_threads: int = 1, advance: Advance = _silent
) -> ShardResult:
    """Decodes and writes shard `number`, then the row file that says it is done; or finds it done and reads that.

    `plan.only(number)` is enough of a plan. `num_threads` clips are decoded at once; the bytes do not depend on it.
    A store that stops answering is waited for. Raises ValueError rather than touch the finished set of another plan,
    and for a source that is not what the plan knows.
    """
    index = outlast(lambda: finished_set(plan, store))
    if index is not None:
        return _finished_shard(plan, number, index, store)
    kept = outlast(lambda: _kept(plan, number, store))
    if kept is not None:
        return kept
    with scratch() as folder:
        local = folder / "shard.tar"
        rows, rejected = write_shard(plan, number, local, num_threads=num_threads, advance=advance)
        described = {"plan": plan.fingerprint, "rejected": rejected, "num_bytes": local.stat().st_size}
        told = partial(advance, len(plan.shards[number]))
        outlast(lambda: store.upload(local, shard_path(number)), told=told)
        outlast(lambda: store.write(_part_path(number), table_bytes(rows, described)), told=told)
    return _result(number, rows, described, reused=False)


def finish(plan: PackPlan, results: Sequence[ShardResult], store: Store) -> Index:
    """Writes rejected.parquet, then index.parquet: from then on the set exists.

    Raises ValueError if no video could be packed (rejected.parquet then says why), or if another job has finished
    another set here meanwhile.
    """
    index = finished_set(plan, store) or _publish(plan, results, store)
    for path in store.list(_PARTS):
        store.delete(path)
    return index


def _part_path(number: int) -> str:
    """Where the row file lies that says a shard is done."""
    return f"{_PARTS}{number:06d}.parquet"


def shard_path(number: int) -> str:
    """Where a shard lies below its set."""
    return f"{_SHARDS}{number:06d}.tar"


def _publish(plan: PackPlan, results: Sequence[ShardResult], store: Store) -> Index:
    results = sorted(results, key=lambda result: result.number)
    assert [result.number for result in results] == list(range(len(plan.shards))), "one result a shard"
    _check_shards(plan, results, store)
    rejected = sorted(row for result in results for row in result.rejected)
    write_rejected(plan, rejected, store)
    rows = pa.concat_tables([result.rows for result in results])
    if not rows.num_rows:
        path, reason = rejected[0]
        raise UserError(
            f"none of the {len(rejected)} videos can be packed; the reasons are in {store.uri}/{REJECTED_PATH}, "
            f"that of the first, {path}: {reason}"
        )
    index = make_index(
        name=plan.name,
        actions=plan.actions,
        packing=plan.options.facts(),
        num_frames=plan.options.num_frames,
        plan=plan.fingerprint,
        rows=rows,
    )
    if store.write_if_absent(INDEX_PATH, index_bytes(index)):
        return index
    finished = finished_set(plan, store)  # another job was quicker; raises if its plan was another
    assert finished is not None
    return finished


def write_rejected(plan: PackPlan, rejected: Sequence[tuple[str, str]], store: Store) -> None:
    """Writes rejected.parquet: path and reason of each video that could not be packed."""
    columns = [pa.array(column, pa.string()) for column in (zip(*rejected, strict=True) if rejected else ([], []))]
    table = pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)
    store.write(REJECTED_PATH, table_bytes(table, {"plan": plan.fingerprint}))


def _kept(plan: PackPlan, number: int, store: Store) -> ShardResult | None:
    """The result of a shard that an earlier job has packed; None, and no row file, if no job of this plan has."""
    path = _part_path(number)
    if not store.exists(path):
        return None
    try:
        rows, described = read_table(store, path)
        if described.get("plan") == plan.fingerprint and store.size(shard_path(number)) == described["num_bytes"]:
            return _result(number, rows, described, reused=True)
    except StoreError as error:
        if not isinstance(error, MissingObject):  # which means that somebody has removed the shard alone
            raise
    except UserError:
        pass  # no Parquet file
    store.delete(path)  # before its shard is overwritten, or that other plan would take our shard for its own
    return None


def _finished_shard(plan: PackPlan, number: int, index: Index, store: Store) -> ShardResult:
    """The result of a shard whose set is finished, so that packing again changes nothing."""
    rows = rows_where(index.clips_table.table, "shard", shard_path(number))
    names = {printable(clip.video.name) for clip in plan.shards[number]}
    rejected = [row for row in read_table(store, REJECTED_PATH)[0].to_pylist() if row["path"] in names]
    described = {
        "rejected": [(row["path"], row["reason"]) for row in rejected],
        "num_bytes": store.size(shard_path(number)),
    }
    return _result(number, rows, described, reused=True)


def _check_shards(plan: PackPlan, results: Sequence[ShardResult], store: Store) -> None:
    """The shards are those of the results, and no shard of an abandoned plan is left beside them."""
    for result in results:
        path = shard_path(result.number)
        if store.size(path) != result.num_bytes:
            raise UserError(
                f"{store.uri}/{path} has {store.size(path)} bytes instead of {result.num_bytes}: another job packs "
                "into the same place; let one of them finish, then run tavlad pack again"
            )
    known = {shard_path(number) for number in range(len(plan.shards))}
    for path in store.list(_SHARDS):
        if path not in known:
            store.delete(path)


def write_shard(
    plan: PackPlan, number: int, local: Path, *, num_threads: int = 1, advance: Advance = _silent
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Packs a shard into a local file; returns its clips' rows, and path and reason of each rejected video."""
    rows: list[Row] = []
    rejected: list[tuple[str, str]] = []
    offset = 0
    with local.open("wb") as file, ThreadPoolExecutor(num_threads, "pack-clips") as pool:
        packed = _in_order(pool, partial(pack_clip, plan), plan.shards[number], ahead=num_threads)
        for num_done, (clip, outcome) in enumerate(zip(plan.shards[number], packed, strict=True), start=1):
            advance(num_done, "")
            if isinstance(outcome, VideoError):
                rejected.append((printable(clip.video.name), outcome.reason))
                continue
            members, row = outcome
            row |= {"shard": shard_path(number), "offset": offset, "length": len(members)}
            rows.append(row | {"sha256": hashlib.sha256(members).hexdigest()})
            offset += file.write(members)
        file.write(END_OF_SHARD)
    return pa.Table.from_pylist(rows, schema=SCHEMA), rejected


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[PlannedClip], tuple[bytes, Row] | VideoError],
    clips: Iterable[PlannedClip],
    ahead: int,
) -> Iterator[tuple[bytes, Row] | VideoError]:
    """Like `pool.map`, but holds no more than `ahead` results, for the memory."""
    waiting: deque[Future[tuple[bytes, Row] | VideoError]] = deque()
    for clip in clips:
        if len(waiting) > ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work, clip))
    while waiting:
        yield waiting.popleft().result()


def _result(number: int, rows: pa.Table, described: dict[str, Any], reused: bool) -> ShardResult:
    return ShardResult(
        number=number,
        rows=rows.replace_schema_metadata(None),
        rejected=tuple((path, reason) for path, reason in described["rejected"]),
        num_bytes=described["num_bytes"],
        reused=reused,
    )
