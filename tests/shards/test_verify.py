"""Verifying a set names every clip that is not what was packed."""

from dataclasses import replace

import pyarrow as pa
import pytest

from shards.index import index_bytes, make_index
from shards.plan import plan_packing
from shards.store import Store, open_store
from shards.verify import rows_by_shard, verify


def test_whole_set_has_no_problems(packed) -> None:
    assert verify(packed.store) == []


def test_flipped_byte_is_found_in_whichever_clip_it_is(packed, copy_of_packed: Store) -> None:
    for row in (0, 7, 17):
        place = packed.index.clips_table.place(row)
        whole = packed.store.read(place.shard)
        damaged = bytearray(whole)
        damaged[place.offset + place.length - 513] ^= 1
        copy_of_packed.write(place.shard, bytes(damaged))
        problems = verify(copy_of_packed)
        assert [str(found) for found in problems] == [
            f"{place.shard}: clip {place.key} is not what was packed: its digest differs"
        ]
        copy_of_packed.write(place.shard, whole)


def test_truncated_shard_names_the_clips_that_are_lost(packed, copy_of_packed: Store) -> None:
    place = packed.index.clips_table.place(3)
    copy_of_packed.write(place.shard, packed.store.read(place.shard)[: place.offset + 100])
    lost = [(found.shard, found.key) for found in verify(copy_of_packed)]
    places = map(packed.index.clips_table.place, range(3, 18))
    assert lost == [(other.shard, other.key) for other in places if other.shard == place.shard]
    assert "cannot be read: the shard is truncated" in str(verify(copy_of_packed)[0])


def test_missing_shard_is_told_once(copy_of_packed: Store) -> None:
    copy_of_packed.delete("shards/000001.tar")
    assert [str(problem) for problem in verify(copy_of_packed)] == ["shards/000001.tar: is missing"]


def test_set_that_does_not_exist_cannot_be_verified(tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no set"):
        verify(open_store(str(tmp_path)))


def test_shard_whose_end_is_cut_or_changed_is_found_though_all_clips_are_whole(packed, copy_of_packed: Store) -> None:
    whole = packed.store.read("shards/000001.tar")
    copy_of_packed.write("shards/000001.tar", whole[:-512])
    size = f"has {len(whole) - 512} bytes instead of {len(whole)}"
    assert [str(problem) for problem in verify(copy_of_packed)] == [f"shards/000001.tar: {size}"]
    copy_of_packed.write("shards/000001.tar", whole[:-1] + b"x")
    assert [str(problem) for problem in verify(copy_of_packed)] == ["shards/000001.tar: does not end like a tar file"]


def test_index_of_another_set_is_told(packed, copy_of_packed: Store, tmp_path, numbered) -> None:
    other = open_store(str(tmp_path / "other"))
    numbered.pack(plan_packing(packed.videos, replace(packed.plan.options, jpeg_quality=60)), other)
    copy_of_packed.write("index.parquet", other.read("index.parquet"))
    problems = verify(copy_of_packed)
    assert str(problems[0]) == (
        "index.parquet: is of another set than rejected.parquet: one of them does not belong here"
    )
    assert {problem.key for problem in problems[1:]} == set(packed.index.clips_table.keys())


def test_index_whose_rows_were_changed_is_told_by_clip(packed, copy_of_packed: Store) -> None:
    """A clip's digest covers what its own json says, so labels changed in the index alone do not pass."""
    index, table = packed.index, packed.index.clips_table.table
    labels = table["label"].to_pylist()
    labels[5] = (labels[5] + 1) % 3
    changed = table.set_column(
        table.schema.get_field_index("label"), table.schema.field("label"), pa.array(labels, pa.int32())
    )
    forged = make_index(
        name=index.name,
        actions=index.actions,
        packing=index.packing,
        num_frames=index.num_frames,
        plan=index.plan,
        rows=changed,
    )
    copy_of_packed.write("index.parquet", index_bytes(forged))
    place, was = index.clips_table.place(5), table["label"][5].as_py()
    what = f"has label {labels[5]} here, and {was} in {place.shard}"
    assert [str(problem) for problem in verify(copy_of_packed)] == [f"index.parquet: clip {place.key} {what}"]
    without_a_clip = index_bytes(replace(index, clips_table=type(index.clips_table).of(table.slice(1))))
    copy_of_packed.write("index.parquet", without_a_clip)
    assert "index.parquet: is not what packing wrote: its fingerprint differs" in map(str, verify(copy_of_packed))


def test_objects_that_are_missing_or_too_many_are_told(packed, copy_of_packed: Store) -> None:
    copy_of_packed.write("shards/000007.tar", packed.store.read("shards/000000.tar"))
    copy_of_packed.write("shards/000008.tar", bytes(1024))  # all of its videos were rejected
    copy_of_packed.delete("rejected.parquet")
    expected = ["rejected.parquet: is missing", "shards/000007.tar: is not part of the set"]
    assert [str(problem) for problem in verify(copy_of_packed)] == expected
    copy_of_packed.delete("shards/000007.tar")
    copy_of_packed.write("rejected.parquet", b"no Parquet")
    assert [str(problem) for problem in verify(copy_of_packed)] == ["rejected.parquet: is not a Parquet file"]


def test_rows_of_a_shard_are_found_in_any_order(packed) -> None:
    index = packed.index
    shuffled = index.clips_table.table.take(pa.array([*range(1, 18, 2), *range(0, 18, 2)]))
    by_shard = dict(rows_by_shard(replace(index, clips_table=type(index.clips_table).of(shuffled))))
    assert sorted(by_shard) == [f"shards/{number:06d}.tar" for number in range(3)]
    for shard, rows in by_shard.items():
        expected = {row["key"] for row in index.clips_table.table.to_pylist() if row["shard"] == shard}
        assert set(rows["key"].to_pylist()) == expected
