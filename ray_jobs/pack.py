"""tavlad pack: labelled videos become a shard set, one Ray task a shard; --repair: damaged shards once more."""

from dataclasses import dataclass
from typing import Any

import ray

from infra.site import Site, load_site
from ray_jobs.cluster import connect, num_cpus, num_cpus_of_a_node
from ray_jobs.console import Console
from ray_jobs.tasks import Progress, run_tasks
from ray_jobs.verify import show_problems, verify_set
from shards.datasets import VideoSet
from shards.index import INDEX_PATH, REJECTED_PATH, Index, read_table
from shards.pack import ShardResult, finish, finished_set, kept_shards, pack_shard, shard_path
from shards.patience import outlast
from shards.plan import PackOptions, PackPlan, plan_packing
from shards.repair import index_to_keep, numbers_of, repair_rejected, repair_shard
from shards.store import Store, open_store
from shards.verify import Problem, rows_by_shard, verify_shard
from tavlad.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A finished set."""

    uri: str
    index: Index
    rejected: tuple[tuple[str, str], ...]
    """Videos that could not be packed, and why."""


def pack(site: Site, videos: VideoSet, uri: str, options: PackOptions, console: Console) -> Packed:
    """Pack the videos into a set at `uri`; what an earlier, interrupted packing finished is kept.

    Videos that cannot be packed are in the set's rejected.parquet, and in the result.
    """
    store = open_store(uri, site.s3)
    return _pack(site, _plan(videos, options, console), store, console)


def repair(site: Site, videos: VideoSet, uri: str, options: PackOptions, console: Console) -> Packed:
    """Pack again what is damaged of the set at `uri`, from the videos and with the options that made it.

    A shard is replaced only by the very bytes that the index describes; where the index itself is lost or wrong, all
    is packed again. Raises ValueError for a set of other videos or options.
    """
    store = open_store(uri, site.s3)
    plan = _plan(videos, options, console)
    index = index_to_keep(plan, store)
    problems = () if index is None else verify_set(site, uri, console).problems
    if index is None or any(problem.shard == INDEX_PATH for problem in problems):
        console.say(f"  {INDEX_PATH} is lost or wrong: the set is packed again, whole")
        store.delete(INDEX_PATH)
        return _pack(site, plan, store, console)
    if problems:
        show_problems(problems, console)
        _repair(site, plan, index, problems, store, console)
    console.say(f"  repaired: {uri}" if problems else f"  nothing to repair: {uri}")
    return Packed(uri=uri, index=index, rejected=_read_rejected(store))


def _plan(videos: VideoSet, options: PackOptions, console: Console) -> PackPlan:
    with console.progress("videos read for their digests", len(videos.videos)) as advance:
        return plan_packing(videos, options, advance=lambda num_read: advance(num_read, ""))


def _pack(site: Site, plan: PackPlan, store: Store, console: Console) -> Packed:
    uri = store.uri
    if finished_set(plan, store) is not None:
        console.say(f"  packed already: {uri}")
        index = finish(plan, [], store)  # an earlier job may have been killed while it tidied up
        return Packed(uri=uri, index=index, rejected=_read_rejected(store))
    connect(site, console.say)
    console.heading(f"Packing {plan.num_clips} videos into {len(plan.shards)} shards at {uri}")
    kept = kept_shards(plan, store)
    if kept:
        console.say(f"  {len(kept)} shards are kept from an earlier packing")
    results = kept + _pack_shards(site, plan, {result.number for result in kept}, uri, console)
    index = outlast(lambda: finish(plan, results, store), told=lambda note: console.say(f"  {note}") if note else None)
    rejected = tuple(row for result in results for row in result.rejected)
    for path, reason in rejected:
        console.say(f"  rejected {path}: {reason}")
    console.say(f"  {len(index.clips_table)} clips packed, {len(rejected)} videos rejected")
    return Packed(uri=uri, index=index, rejected=rejected)


def _pack_shards(site: Site, plan: PackPlan, done: set[int], uri: str, console: Console) -> list[ShardResult]:
    numbers = [number for number in range(len(plan.shards)) if number not in done]
    if not numbers:
        return []
    num_clips = sum(len(plan.shards[number]) for number in numbers)
    threads = _threads(len(numbers))
    calls = ((site.name, uri, plan.only(number), number, threads) for number in numbers)
    return run_tasks(_pack_shard.options(num_cpus=threads), calls, "videos packed", num_clips, console)


def _repair(
    site: Site, plan: PackPlan, index: Index, problems: tuple[Problem, ...], store: Store, console: Console
) -> None:
    rows = dict(rows_by_shard(index))
    damaged = {problem.shard for problem in problems}
    numbers = numbers_of(plan, damaged & rows.keys())
    num_clips = sum(len(plan.shards[number]) for number in numbers)
    threads = _threads(len(numbers))
    calls = ((site.name, store.uri, plan.only(n), n, rows[shard_path(n)], threads) for n in numbers)
    task = _repair_shard.options(num_cpus=threads)
    for left in run_tasks(task, calls, "videos packed again", num_clips, console):
        if left:
            raise UserError(f"{left[0]} even after it was packed again: the store does not keep what is written to it")
    if REJECTED_PATH in damaged:
        repair_rejected(plan, index, store)
    for path in damaged - rows.keys() - {REJECTED_PATH}:
        store.delete(path)  # a shard that is not part of the set


def _threads(num_tasks: int) -> int:
    """Clips that a task decodes at once: where there are fewer tasks than CPUs, each takes several of a node."""
    return max(1, min(num_cpus() // max(1, num_tasks), num_cpus_of_a_node()))


def _read_rejected(store: Store) -> tuple[tuple[str, str], ...]:
    table, _ = read_table(store, REJECTED_PATH)
    return tuple((row["path"], row["reason"]) for row in table.to_pylist())


@ray.remote
def _pack_shard(site_name: str, uri: str, plan: PackPlan, number: int, threads: int, progress: Progress) -> ShardResult:
    store = open_store(uri, load_site(site_name).s3)
    return pack_shard(plan, number, store, num_threads=threads, advance=progress)


@ray.remote
def _repair_shard(
    site_name: str, uri: str, plan: PackPlan, number: int, rows: Any, threads: int, progress: Progress
) -> list[Problem]:
    store = open_store(uri, load_site(site_name).s3)
    repair_shard(plan, number, rows, store, num_threads=threads, advance=progress)
    return verify_shard(store, shard_path(number), rows)
