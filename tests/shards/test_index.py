"""The index describes the whole set, and a split is a filter on it."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.index import SCHEMA, index_bytes, load_index, make_index, table_bytes
from shards.store import open_store
from tavlad.errors import UserError


def test_index_says_what_the_set_is(packed) -> None:
    index = load_index(packed.store)
    assert (index.name, index.actions, index.num_frames) == ("numbers", ("clap", "jump", "wave"), 4)
    sizes = {"num_frames": 4, "short_side": 32, "jpeg_quality": 90, "shard_megabytes": 64.0}
    assert index.packing == {"format": "frames", **sizes, "seed": 0}
    assert (index.plan, index.fingerprint) == (packed.plan.fingerprint, packed.index.fingerprint)
    assert index.clips_table.table.equals(packed.index.clips_table.table)


def test_index_is_a_parquet_file_that_others_can_read(packed) -> None:
    table = pq.read_table(Path(packed.store.uri, "index.parquet"))
    assert table.schema.remove_metadata().equals(SCHEMA)
    assert table.num_rows == 18
    described = json.loads(table.schema.metadata[b"tavlad"])
    assert described["fingerprint"] == packed.index.fingerprint
    assert described["format"] == 1


def test_splits_are_filters_on_the_same_clips(packed) -> None:
    for split in (1, 2, 3):
        train, test = packed.index.clips(split, "train"), packed.index.clips(split, "test")
        assert (len(train), len(test)) == (12, 6)
        assert set(train.keys()) | set(test.keys()) == set(packed.index.clips_table.keys())
        assert Counter(test.labels_N.tolist()) == {0: 2, 1: 2, 2: 2}
    videos = {video.name: video.splits[1] for video in packed.videos.videos}
    names = packed.index.clips(2, "test").table["source"].to_pylist()
    assert sorted(names) == sorted(name for name, part in videos.items() if part == "test")


def test_a_row_leads_to_its_clip(packed) -> None:
    clips = packed.index.clips(1, "test")
    for row in range(len(clips)):
        place = clips.place(row)
        assert place.key == clips.keys([row])[0]
        assert clips.groups()[row] == clips.table["source"][row].as_py().removesuffix(".avi")
        members = packed.store.read_range(place.shard, place.offset, place.length)
        assert members.startswith(f"{place.key}.json".encode())


def test_absent_split_or_part_is_an_error(packed) -> None:
    with pytest.raises(ValueError, match="there is no split 4"):
        packed.index.clips(4, "train")
    table = packed.index.clips_table.table
    unused = table.set_column(table.column_names.index("split2"), "split2", pa.array(["unused"] * 18))
    index = make_index(name="n", actions=packed.index.actions, num_frames=4, packing={}, plan="", rows=unused)
    with pytest.raises(ValueError, match="split 2 of 'n' has no train clips; choose a split that was packed"):
        index.clips(2, "train")


def test_fingerprint_covers_every_clip_and_every_description(packed) -> None:
    def fingerprint(**changes: object) -> str:
        facts = {
            "name": "n",
            "actions": ("a", "b", "c"),
            "num_frames": 4,
            "packing": {"seed": 0},
            "plan": "p",
            "rows": packed.index.clips_table.table,
        }
        return make_index(**(facts | changes)).fingerprint

    table = packed.index.clips_table.table
    digests = table["sha256"].to_pylist()
    other_clip = table.set_column(
        table.column_names.index("sha256"), "sha256", pa.array([*digests[:-1], "0" * 64], pa.string())
    )
    fingerprints = {
        fingerprint(),
        fingerprint(name="m"),
        fingerprint(actions=("b", "a", "c")),
        fingerprint(num_frames=5),
        fingerprint(packing={"seed": 1}),
        fingerprint(plan="q"),
        fingerprint(rows=other_clip),
        fingerprint(rows=table.slice(0, 17)),
    }
    assert len(fingerprints) == 8
    assert fingerprint() == fingerprint(rows=pa.concat_tables([table.slice(0, 5), table.slice(5)]))


def test_unfinished_set_is_told_with_the_remedy(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("shards/000000.tar", b"")
    with pytest.raises(UserError, match=f"{tmp_path} is not finished: .*: run its tavlad pack command again"):
        load_index(store)


def test_a_name_that_no_set_has_is_told_with_the_nearest_that_some_have(packed, tmp_path: Path) -> None:
    place = open_store(str(tmp_path))
    with pytest.raises(UserError, match=f"there is no set at {tmp_path}/hmdb15: pack one there with tavlad pack$"):
        load_index(place.child("hmdb15"))
    for name in ("hmdb51", "hmdb51-flow", "hmdb51-difference", "ucf101"):
        place.write(f"{name}/index.parquet", index_bytes(packed.index))
    place.write("hmdb15-begun/parts/000000.parquet", b"")
    nearest = "hmdb51, hmdb51-flow, hmdb51-difference"
    with pytest.raises(UserError, match=f"there is no set at {tmp_path}/hmdb15: the nearest there: {nearest}$"):
        load_index(place.child("hmdb15"))


def test_index_of_another_format_or_none_is_told(packed, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("index.parquet", table_bytes(packed.index.clips_table.table, {"format": 99}))
    with pytest.raises(ValueError, match=r"index\.parquet has format 99, not 1: pack the set again"):
        load_index(store)
    store.write("index.parquet", b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"index\.parquet is not a Parquet file: repair the set with"):
        load_index(store)
    store.write("index.parquet", index_bytes(packed.index))
    assert load_index(store).fingerprint == packed.index.fingerprint
