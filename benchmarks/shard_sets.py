"""Packed sets for benchmarks: rendered once, and shown over and over.

python -m benchmarks.shard_sets FOLDER [--videos-per-action 8]

Packs rendered videos into FOLDER (64 clips, about 15 MB): small enough to be taken to another machine.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import pyarrow as pa

from shards.index import ClipTable, Index


def repeated(index: Index, num_clips: int) -> Index:
    """The index with its clips over and over, all of split 1's training part, under keys of their own."""
    table = index.clips_table.table
    rows = table.take([row % len(table) for row in range(num_clips)])
    keys = pa.array([f"{key}-{number}" for number, key in enumerate(rows["key"].to_pylist())])
    rows = rows.set_column(rows.column_names.index("key"), "key", keys)
    rows = rows.set_column(rows.column_names.index("split1"), "split1", pa.array(["train"] * num_clips))
    return dataclasses.replace(index, clips_table=ClipTable.of(rows))


def pack_rendered(folder: Path, videos_per_action: int) -> None:
    """Renders videos of eight actions and packs them into the folder. Needs PyAV; reading the set does not."""
    from shards.datasets import scan
    from shards.pack import finish, pack_shard
    from shards.plan import PackOptions, plan_packing
    from shards.render import render_videos
    from shards.store import open_store

    store = open_store(str(folder))
    with tempfile.TemporaryDirectory(prefix="tavlad-bench-") as videos:
        render_videos(Path(videos), videos_per_action, 0)
        plan = plan_packing(scan("bench", Path(videos), "folders"), PackOptions())
        finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos-per-action", type=int, default=8)
    options = parser.parse_args()
    pack_rendered(options.folder, options.videos_per_action)


if __name__ == "__main__":
    main()
