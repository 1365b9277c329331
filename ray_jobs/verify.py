"""tavlad verify: every clip of a set is read again and compared with its digest, a Ray task a shard."""

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any

import ray

from infra.site import Site, load_site
from ray_jobs.cluster import connect
from ray_jobs.console import Console
from ray_jobs.tasks import Progress, run_tasks
from shards.index import Index
from shards.plan import PackOptions
from shards.store import open_store
from shards.verify import Problem, rows_by_shard, verify_index, verify_shard

_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A set that was read from end to end."""

    uri: str
    index: Index
    problems: tuple[Problem, ...]
    repair: str
    """The command that mends it, but for where the videos are."""

    def document(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "uri": self.uri,
            "fingerprint": self.index.fingerprint,
            "clips": len(self.index.clips_table),
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "repair": self.repair if self.problems else None,
        }


def verify_set(site: Site, uri: str, console: Console) -> Verified:
    """Read the set at `uri` again and tell what is wrong with it. ValueError if there is no finished set."""
    connect(site, console.say)
    index, problems = verify_index(open_store(uri, site.s3))
    console.heading(f"Verifying {len(index.clips_table)} clips of {uri}")
    calls = ((site.name, uri, shard, rows) for shard, rows in rows_by_shard(index))
    for found in run_tasks(_verify_shard, calls, "clips verified", len(index.clips_table), console):
        problems += found
    return Verified(uri=uri, index=index, problems=tuple(problems), repair=_repair_command(site, uri, index))


def show_problems(problems: tuple[Problem, ...], console: Console) -> None:
    """A table of the first problems, and how many more there are."""
    console.table(["object", "clip", "problem"], [[each.shard, each.key, each.what] for each in problems[:_SHOWN]])
    if len(problems) > _SHOWN:
        console.say(f"  and {len(problems) - _SHOWN} more; --json lists them all")


def _repair_command(site: Site, uri: str, index: Index) -> str:
    flags = ["--name", index.name]
    if uri != site.dataset_uri(index.name):
        flags += ["--to", uri]
    default = dataclasses.asdict(PackOptions())
    for field, value in index.packing.items():
        if value != default[field]:
            flags += [f"--{field.replace('_', '-')}", str(value)]
    return f"tavlad pack VIDEOS {shlex.join(flags)} --repair"


@ray.remote(num_cpus=1)
def _verify_shard(site_name: str, uri: str, shard: str, rows: Any, progress: Progress) -> list[Problem]:
    return verify_shard(open_store(uri, load_site(site_name).s3), shard, rows, advance=progress)
