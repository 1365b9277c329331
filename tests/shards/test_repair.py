"""Repair gives back the very set that was packed, from the videos, or changes nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shards.datasets import VideoSet, scan
from shards.pack import shard_path
from shards.plan import PackPlan, plan_packing
from shards.repair import index_to_keep, numbers_of, repair_rejected, repair_shard
from shards.store import Store, open_store
from shards.verify import rows_by_shard, verify


def content(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


def repair(plan: PackPlan, number: int, store: Store) -> None:
    index = index_to_keep(plan, store)
    assert index is not None
    rows = dict(rows_by_shard(index))[shard_path(number)]
    repair_shard(plan.only(number), number, rows, store, num_threads=2, advance=lambda done, note: None)


@pytest.mark.parametrize(
    "damage",
    [lambda shard: shard[:2000] + b"!" + shard[2001:], lambda shard: shard[:5000], None],
    ids=["flipped", "truncated", "deleted"],
)
def test_damaged_shard_is_given_back_its_bytes_and_no_other_is_touched(
    packed, copy_of_packed: Store, watched, damage: Callable[[bytes], bytes] | None
) -> None:
    copy_of_packed.delete("shards/000001.tar")
    if damage is not None:
        copy_of_packed.write("shards/000001.tar", damage(packed.store.read("shards/000001.tar")))
    assert {problem.shard for problem in verify(copy_of_packed)} == {"shards/000001.tar"}
    store = watched(copy_of_packed)
    repair(packed.plan, 1, store)
    assert content(copy_of_packed) == content(packed.store)
    assert store.writes == ["shards/000001.tar"]
    assert verify(copy_of_packed) == []


def test_shard_that_comes_out_otherwise_is_not_replaced(
    packed, copy_of_packed: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shards.clip_packing
    from shards.clip_bytes import encode_jpeg

    copy_of_packed.write("shards/000000.tar", b"damaged")
    # As if another version of the JPEG library encoded.
    monkeypatch.setattr(shards.clip_packing, "encode_jpeg", lambda frame_CHW, quality: encode_jpeg(frame_CHW, 30))
    with pytest.raises(ValueError, match=r"shards/000000\.tar comes out otherwise .*clip \S+ has another \w+.*PyAV"):
        repair(packed.plan, 0, copy_of_packed)
    assert copy_of_packed.read("shards/000000.tar") == b"damaged"


def test_index_is_kept_if_it_is_the_plans(packed, copy_of_packed: Store) -> None:
    index = index_to_keep(packed.plan, copy_of_packed)
    assert index is not None
    assert index.fingerprint == packed.index.fingerprint


@pytest.mark.parametrize("loss", ["foreign", "unreadable", "missing"])
def test_lost_index_is_made_again_with_the_same_set(
    loss: str, packed, copy_of_packed: Store, tmp_path, numbered
) -> None:
    if loss == "foreign":
        other = open_store(str(tmp_path / "other"))
        numbered.pack(plan_packing(packed.videos, replace(packed.plan.options, jpeg_quality=60)), other)
        copy_of_packed.write("index.parquet", other.read("index.parquet"))
    elif loss == "unreadable":
        copy_of_packed.write("index.parquet", b"no Parquet")
    else:
        copy_of_packed.delete("index.parquet")
    assert index_to_keep(packed.plan, copy_of_packed) is None
    copy_of_packed.delete("index.parquet")
    numbered.pack(packed.plan, copy_of_packed)
    assert content(copy_of_packed) == content(packed.store)


def test_set_of_other_videos_or_options_is_not_repaired(packed, copy_of_packed: Store, videos: VideoSet) -> None:
    other = plan_packing(videos, replace(packed.plan.options, jpeg_quality=60))
    with pytest.raises(ValueError, match=r"holds the finished set 'numbers' of plan .* choose another name"):
        index_to_keep(other, copy_of_packed)
    copy_of_packed.write("index.parquet", b"no Parquet")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        index_to_keep(other, copy_of_packed)
    copy_of_packed.delete("rejected.parquet")  # then nothing tells whose set it was
    with pytest.raises(ValueError, match="is not a Parquet file"):
        index_to_keep(packed.plan, copy_of_packed)


def test_rejected_rows_are_made_again(tmp_path, numbered) -> None:
    folder = numbered.folders(tmp_path / "v", videos_per_action=2)
    (folder / "wave" / "empty.mp4").touch()
    (folder / "clap" / "text.mp4").write_text("no video" * 100)
    store, plan = open_store(str(tmp_path / "s")), plan_packing(scan("n", folder, "folders"), numbered.options)
    index = numbered.pack(plan, store)
    whole = content(store)
    store.delete("rejected.parquet")
    repair_rejected(plan, index, store)
    assert content(store) == whole
    fewer = replace(index, clips_table=type(index.clips_table).of(index.clips_table.table.slice(1)))
    with pytest.raises(ValueError, match=r"can be packed now, and could not be when the set was"):
        repair_rejected(plan, fewer, store)


def test_numbers_of_shards_are_the_plans(packed) -> None:
    assert numbers_of(packed.plan, {"shards/000002.tar", "shards/000000.tar", "shards/000009.tar"}) == [0, 2]
