"""A cold cache is filled a run of clips at a time: each once, nothing unwanted, no wrong clip, errors in place."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards import neighbours
from shards.disk_cache import DiskCache
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.store import Store
from tavlad.clip import BadClip, ClipBatch

OPTIONS = LoaderOptions(batch_size=5, seed=3, crop=24, augment=True, shuffle=True, num_threads=3)


def cache_at(folder: Path, index: Index, max_bytes: int = 10_000_000) -> DiskCache:
    return DiskCache(folder=folder, max_bytes=max_bytes, set_name=index.fingerprint)


def same(one: list[ClipBatch], other: list[ClipBatch]) -> bool:
    return [a.keys for a in one] == [b.keys for b in other] and all(
        torch.equal(a.frames_BTCHW, b.frames_BTCHW) for a, b in zip(one, other, strict=True)
    )


def without_cache(packed, **changes: object) -> list[ClipBatch]:
    return list(ClipLoader(packed.index, packed.store, 1, "train", replace(OPTIONS, **changes)).epoch(0))


def runs_of(packed) -> set[tuple[str, int]]:
    clips = packed.index.clips(1, "train")
    return {neighbours._run_of(clips.place(row)) for row in range(len(clips))}


@pytest.mark.parametrize("num_threads", [0, 1, 4])
@pytest.mark.parametrize("run_bytes", [1, 20_000, 2 << 20])
def test_every_run_is_read_once_and_the_batches_are_the_same(
    packed, watched, tmp_path, monkeypatch: pytest.MonkeyPatch, run_bytes: int, num_threads: int
) -> None:
    monkeypatch.setattr(neighbours, "_RUN_BYTES", run_bytes)
    store, options = watched(packed.store), replace(OPTIONS, num_threads=num_threads)
    loader = ClipLoader(packed.index, store, 1, "train", options, cache=cache_at(tmp_path, packed.index))
    for _ in range(2):
        assert same(list(loader.epoch(0)), without_cache(packed))
        assert len(store.reads) == len(runs_of(packed))
    assert len(runs_of(packed)) == {1: 12, 2 << 20: 3}.get(run_bytes, len(runs_of(packed)))


def test_what_lies_too_far_away_is_asked_for_apart(packed, watched, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_GAP_BYTES", -1)  # even what touches
    store = watched(packed.store)
    loader = ClipLoader(packed.index, store, 1, "train", OPTIONS, cache=cache_at(tmp_path, packed.index))
    assert same(list(loader.epoch(0)), without_cache(packed))
    assert len(store.reads) == 12


def test_only_what_this_reader_will_need_is_kept(packed, tmp_path) -> None:
    cache = cache_at(tmp_path, packed.index)
    loader = ClipLoader(packed.index, packed.store, 1, "train", OPTIONS, 1, 3, cache)
    read = [key for batch in loader.epoch(0, 1) for key in batch.keys]
    clips = packed.index.clips(1, "all")
    kept = [clips.key(row) for row in range(len(clips)) if cache.has(clips.place(row).sha256)]
    assert sorted(kept) == sorted(read)
    assert 0 < len(read) < 5


def test_full_cache_is_not_fetched_for(packed, watched, tmp_path) -> None:
    store = watched(packed.store)
    loader = ClipLoader(packed.index, store, 1, "train", OPTIONS, cache=cache_at(tmp_path, packed.index, 1))
    assert same(list(loader.epoch(0)), without_cache(packed))
    assert len(store.reads) <= 12 + 3  # at most a run a shard before it is known


@pytest.mark.parametrize("how", ["flipped byte", "truncated", "deleted"])
def test_damage_among_neighbours_stops_the_run_at_its_place_with_its_name(
    packed, copy_of_packed: Store, tmp_path, how: str
) -> None:
    options = replace(OPTIONS, batch_size=1, shuffle=False)
    loader = ClipLoader(packed.index, copy_of_packed, 1, "train", options, cache=cache_at(tmp_path, packed.index))
    places = [loader.clips.place(row) for row in range(12)]
    shard = places[0].shard
    rows = [row for row, place in enumerate(places) if place.shard == shard]
    damaged_row = rows[0] if how == "deleted" else max(rows, key=lambda row: places[row].offset)
    damaged = places[damaged_row]
    data = bytearray(copy_of_packed.read(shard))
    data[damaged.offset + damaged.length // 2] ^= 1
    if how == "deleted":
        copy_of_packed.delete(shard)
    else:
        copy_of_packed.write(shard, bytes(data if how == "flipped byte" else data[: damaged.offset + 10]))
    batches = loader.epoch(0)
    expected = without_cache(packed, batch_size=1, shuffle=False)
    assert same([next(batches) for _ in range(damaged_row)], expected[:damaged_row])
    with pytest.raises(BadClip, match=f"clip {damaged.key} in .*{shard} .*: run tavlad verify"):
        next(batches)
