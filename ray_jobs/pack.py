"""tavlad pack: labelled videos become a shard set, one Ray task a shard."""

from dataclasses import dataclass
from typing import Any

import ray

from infra.site import Site, load_site
from ray_jobs.cluster import connect, num_cpus, result_of
from ray_jobs.console import Console
from shards.datasets import VideoSet
from shards.index import REJECTED_PATH, Index, read_table
from shards.pack import PackOptions, PackPlan, ShardResult, finish, finished_set, pack_shard, plan_packing
from shards.store import Store, open_store

_TASKS_PER_CPU = 2  # in flight: enough to keep every CPU busy, few enough to stop soon


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
    plan = plan_packing(videos, options)
    index = finished_set(plan, store)
    if index is not None:
        console.say(f"  packed already: {uri}")
        return Packed(uri=uri, index=index, rejected=_read_rejected(store))
    connect(site)
    console.heading(f"Packing {len(videos.videos)} videos into {len(plan.shards)} shards at {uri}")
    results = _pack_shards(site, plan, uri, console)
    index = finish(plan, results, store)
    rejected = tuple(row for result in results for row in result.rejected)
    for path, reason in rejected:
        console.say(f"  rejected {path}: {reason}")
    console.say(f"  {len(index.clips_table)} clips packed, {len(rejected)} videos rejected")
    return Packed(uri=uri, index=index, rejected=rejected)


def _pack_shards(site: Site, plan: PackPlan, uri: str, console: Console) -> list[ShardResult]:
    plan_reference = ray.put(plan)
    waiting = list(range(len(plan.shards)))
    running: list[Any] = []
    results: list[ShardResult] = []
    num_done = 0
    with console.progress("videos packed", sum(map(len, plan.shards))) as advance:
        while waiting or running:
            while waiting and len(running) < _TASKS_PER_CPU * num_cpus():
                running.append(_pack_shard.remote(plan_reference, waiting.pop(0), uri, site.name))
            finished, running = ray.wait(running)
            for reference in finished:
                result: ShardResult = result_of(reference)
                results.append(result)
                num_done += len(plan.shards[result.number])
                advance(num_done, "")
    return results


def _read_rejected(store: Store) -> tuple[tuple[str, str], ...]:
    table, _ = read_table(store, REJECTED_PATH)
    return tuple((row["path"], row["reason"]) for row in table.to_pylist())


@ray.remote(num_cpus=1)
def _pack_shard(plan: PackPlan, number: int, uri: str, site_name: str) -> ShardResult:
    return pack_shard(plan, number, open_store(uri, load_site(site_name).s3))
