"""Verifying a set names every clip that is not what was packed."""

import pytest

from shards.store import Store, open_store
from shards.verify import verify


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
    with pytest.raises(ValueError, match="no finished set"):
        verify(open_store(str(tmp_path)))
