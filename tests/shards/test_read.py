"""Contract 2: the same batches whatever the ranks, the threads and the interruptions; and no wrong clip, ever."""

import gc
import io
import itertools
import tarfile
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.clip_bytes import decode_jpeg
from shards.disk_cache import DiskCache
from shards.index import ClipTable, Index
from shards.order import epoch_order
from shards.read import ClipLoader, LoaderOptions
from shards.store import Store, StoreUnreachable, open_store
from shards.transforms import CENTRE_VIEW, crop_clip, draw_tsn_view, draw_view
from tavlad.clip import BadClip, ClipBatch

OPTIONS = LoaderOptions(batch_size=5, seed=3, crop=24, augment=True, shuffle=True)


def loader(packed, rank: int = 0, world: int = 1, **changes: object) -> ClipLoader:
    return ClipLoader(packed.index, packed.store, 1, "train", replace(OPTIONS, **changes), rank, world)


def same(one: list[ClipBatch], other: list[ClipBatch]) -> bool:
    return len(one) == len(other) and all(
        a.keys == b.keys
        and torch.equal(a.frames_BTCHW, b.frames_BTCHW)
        and torch.equal(a.labels_B, b.labels_B)
        and a.num_clips_in_global_batch == b.num_clips_in_global_batch
        for a, b in zip(one, other, strict=True)
    )


def joined(parts: tuple[ClipBatch, ...]) -> ClipBatch:
    assert len({part.num_clips_in_global_batch for part in parts}) == 1
    return ClipBatch(
        frames_BTCHW=torch.cat([part.frames_BTCHW for part in parts]),
        labels_B=torch.cat([part.labels_B for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        num_clips_in_global_batch=parts[0].num_clips_in_global_batch,
    )


@pytest.fixture(scope="module")
def reference(packed) -> dict[int, list[ClipBatch]]:
    """Epochs 0 and 1, read by one rank without threads."""
    return {epoch: list(loader(packed, num_threads=0).epoch(epoch)) for epoch in (0, 1)}


def test_batches_are_slices_of_the_epochs_order_and_the_last_is_short(packed, reference) -> None:
    clips = packed.index.clips(1, "train")
    for epoch, batches in reference.items():
        order = epoch_order(12, 3, epoch)
        assert [len(batch.keys) for batch in batches] == [5, 5, 2]
        assert [batch.num_clips_in_global_batch for batch in batches] == [5, 5, 2]
        assert [key for batch in batches for key in batch.keys] == clips.keys(order)
        assert torch.cat([batch.labels_B for batch in batches]).tolist() == clips.labels_N[order].tolist()
    assert reference[0][0].keys != reference[1][0].keys


@pytest.mark.parametrize("views", ["corner-scale", "tsn", None])
def test_clips_are_the_packed_jpegs_in_the_drawn_view(packed, views: str | None) -> None:
    members: dict[str, bytes] = {}
    for shard in range(3):
        with tarfile.open(fileobj=io.BytesIO(packed.store.read(f"shards/{shard:06d}.tar"))) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    drawn = {"corner-scale": draw_view, "tsn": draw_tsn_view}.get(views or "")
    changes = {"views": views} if views else {"augment": False}
    for batch in loader(packed, **changes).epoch(1):
        assert batch.frames_BTCHW.shape[1:] == (4, 3, 24, 24)
        for frames_TCHW, key in zip(batch.frames_BTCHW, batch.keys, strict=True):
            packed_TCHW = torch.stack([decode_jpeg(members[f"{key}.{frame:02}.jpg"]) for frame in range(4)])
            view = drawn(3, 1, key) if drawn else CENTRE_VIEW
            assert torch.equal(frames_TCHW, crop_clip(packed_TCHW.contiguous(), view, 24))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_global_batches_are_the_same_for_every_world_and_number_of_threads(
    packed, reference, world: int, num_threads: int
) -> None:
    for epoch, batches in reference.items():
        ranks = [loader(packed, rank, world, num_threads=num_threads).epoch(epoch) for rank in range(world)]
        assert same([joined(parts) for parts in zip(*ranks, strict=True)], batches)


def test_rank_without_a_clip_in_the_short_batch_gets_an_empty_one(packed) -> None:
    batches = [list(loader(packed, rank, 4).epoch(0)) for rank in range(4)]
    assert [len(rank[-1].keys) for rank in batches] == [0, 1, 0, 1]
    empty = batches[0][-1]
    assert empty.frames_BTCHW.shape == (0, 4, 3, 24, 24)
    assert empty.frames_BTCHW.dtype == torch.uint8
    assert empty.num_clips_in_global_batch == 2


def resized(index: Index, num_clips: int) -> Index:
    """The index with so many training clips in split 1, all different in name."""
    table = index.clips(1, "train").table
    rows = table.take([number % len(table) for number in range(num_clips)])
    keys = pa.array([f"{key}-{number}" for number, key in enumerate(rows["key"].to_pylist())])
    return replace(index, clips_table=ClipTable.of(rows.set_column(0, "key", keys)))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_clips=st.integers(1, 40),
    batch_size=st.integers(1, 14),
    worlds=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    num_threads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    epoch=st.integers(0, 50),
    has_cache=st.booleans(),
    data=st.data(),
)
def test_interrupted_epoch_goes_on_as_if_it_had_not_been(
    packed,
    tmp_path_factory: pytest.TempPathFactory,
    num_clips: int,
    batch_size: int,
    worlds: tuple[int, int],
    num_threads: tuple[int, int],
    epoch: int,
    has_cache: bool,
    data: st.DataObject,
) -> None:
    """Stopped at any step by one world and resumed by another: the global batches of one rank without threads."""
    index = resized(packed.index, num_clips)
    folder = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    cache = DiskCache(folder=folder, max_bytes=10_000_000, set_name="set") if has_cache else None

    def global_batches(world: int, threads: int, start: int, stop: int) -> list[ClipBatch]:
        options = replace(OPTIONS, batch_size=batch_size, num_threads=threads, prefetch_batches=2)
        shares = [(rank, world, cache if world > 1 else None) for rank in range(world)]
        ranks = [ClipLoader(index, packed.store, 1, "train", options, *share) for share in shares]
        parts = [list(itertools.islice(rank.epoch(epoch, start), stop - start)) for rank in ranks]
        return [joined(step) for step in zip(*parts, strict=True)]

    steps = -(-num_clips // batch_size)
    whole = global_batches(1, 0, 0, steps)
    assert [key for batch in whole for key in batch.keys] == index.clips(1, "train").keys(
        epoch_order(num_clips, OPTIONS.seed, epoch)
    )
    assert len({key for batch in whole for key in batch.keys}) == num_clips
    stop = data.draw(st.integers(0, steps))
    first = global_batches(worlds[0], num_threads[0], 0, stop)
    assert same(first + global_batches(worlds[1], num_threads[1], stop, steps), whole)


def test_without_shuffling_the_order_is_the_indexs(packed) -> None:
    batches = list(loader(packed, shuffle=False, augment=False).epoch(7))
    assert [key for batch in batches for key in batch.keys] == packed.index.clips(1, "train").keys()


def test_number_of_steps_counts_the_short_batch(packed) -> None:
    assert (loader(packed).num_steps, loader(packed, world=4).num_steps) == (3, 3)
    assert (loader(packed, batch_size=6).num_steps, loader(packed, batch_size=100).num_steps) == (2, 1)
    assert loader(packed).num_clips == 12


def test_small_set_is_read_once_over_all_epochs_with_a_cache(packed, watched, tmp_path) -> None:
    store = watched(packed.store)
    cache = DiskCache(folder=tmp_path, max_bytes=10_000_000, set_name=packed.index.fingerprint)
    for _ in range(2):  # the second loader finds what the first has left
        batches = ClipLoader(packed.index, store, 1, "train", OPTIONS, cache=cache)
        for epoch in range(2):
            assert same(list(batches.epoch(epoch)), list(loader(packed).epoch(epoch)))
    assert sorted(store.reads) == [f"shards/{shard:06}.tar" for shard in range(3)]  # small: a shard at a time


def test_clip_damaged_in_the_cache_is_read_from_the_store(packed, watched, tmp_path) -> None:
    cache = DiskCache(folder=tmp_path, max_bytes=10_000_000, set_name=packed.index.fingerprint)
    list(ClipLoader(packed.index, packed.store, 1, "train", OPTIONS, cache=cache).epoch(0))
    place = packed.index.clips(1, "train").place(0)
    damaged = next(tmp_path.rglob(place.sha256))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    store = watched(packed.store)
    batches = ClipLoader(packed.index, store, 1, "train", OPTIONS, cache=cache)
    assert same(list(batches.epoch(1)), list(loader(packed).epoch(1)))
    assert store.reads == [place.shard]


def test_without_a_cache_every_epoch_is_read_from_the_store(packed, watched) -> None:
    store = watched(packed.store)
    batches = ClipLoader(packed.index, store, 1, "train", OPTIONS)
    for epoch in range(3):
        list(batches.epoch(epoch))
    assert len(store.reads) == 36


def test_batches_that_are_held_are_never_written_to_again(packed) -> None:
    batches = loader(packed, batch_size=2, prefetch_batches=1)
    first = list(batches.epoch(0))  # holds all
    kept = [batch.frames_BTCHW.clone() for batch in first]
    view = first[0].frames_BTCHW[1, 2]  # what holds only a part keeps the memory too
    kept_view = view.clone()
    list(batches.epoch(1))
    assert all(torch.equal(batch.frames_BTCHW, copy) for batch, copy in zip(first, kept, strict=True))
    del first
    list(batches.epoch(2))
    assert torch.equal(view, kept_view)


def test_memory_of_batches_that_nobody_holds_is_used_again(packed) -> None:
    batches = loader(packed, batch_size=2, prefetch_batches=2)
    addresses = {batch.frames_BTCHW.data_ptr() for epoch in range(4) for batch in batches.epoch(epoch)}
    assert len(addresses) <= 4  # two ahead, one with the consumer, one just let go


def threads_of_a_new_thread() -> int:
    inherited: list[int] = []
    born = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    born.start()
    born.join()
    return inherited[0]


def test_operators_of_reading_threads_compute_alone_and_all_others_as_before(packed, monkeypatch) -> None:
    seen: list[int] = []
    fill = ClipLoader._fill

    def watched(*arguments) -> None:
        seen.append(torch.get_num_threads())
        fill(*arguments)

    monkeypatch.setattr(ClipLoader, "_fill", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as beside:
            for _ in range(20):
                born = beside.submit(lambda: [threads_of_a_new_thread() for _ in range(100)])
                batches = loader(packed, num_threads=8).epoch(0)
                next(batches)
                batches.close()
                assert set(born.result()) == {3}
        assert [torch.get_num_threads(), threads_of_a_new_thread()] == [3, 3]
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(threads)


def test_no_more_is_read_ahead_than_the_prefetch_allows(packed, watched) -> None:
    store = watched(packed.store)
    options = replace(OPTIONS, batch_size=2, prefetch_batches=2, num_threads=2)
    batches = ClipLoader(packed.index, store, 1, "train", options).epoch(0)
    for step in range(3):
        next(batches)
        assert 2 * (step + 1) <= len(store.reads) <= 2 * (step + 2)
    batches.close()


def test_threads_end_when_the_consumer_stops_or_fails(packed, copy_of_packed: Store) -> None:
    def reading_threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-clips")]

    gc.collect()  # the batches of a test that failed
    assert not reading_threads()
    batches = loader(packed, batch_size=1, num_threads=3).epoch(0)
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()

    list(itertools.islice(loader(packed, batch_size=1, num_threads=3).epoch(0), 2))
    assert not reading_threads()

    copy_of_packed.delete("shards/000001.tar")
    with pytest.raises(BadClip):
        list(ClipLoader(packed.index, copy_of_packed, 1, "train", OPTIONS).epoch(0))
    assert not reading_threads()


def damage(shard: bytes, place, how: str) -> bytes:
    if how == "flipped byte":
        middle = place.offset + place.length // 2
        return shard[:middle] + bytes([shard[middle] ^ 1]) + shard[middle + 1 :]
    return shard[: place.offset + 10]


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("how", ["flipped byte", "truncated"])
def test_damaged_clip_stops_the_run_at_its_place_with_its_name(
    packed, copy_of_packed: Store, how: str, num_threads: int
) -> None:
    options = replace(OPTIONS, batch_size=1, shuffle=False, num_threads=num_threads)
    damaged = ClipLoader(packed.index, copy_of_packed, 1, "train", options)
    row = 2
    place = damaged.clips.place(row)
    copy_of_packed.write(place.shard, damage(packed.store.read(place.shard), place, how))
    batches = damaged.epoch(0)
    assert [next(batches).keys for _ in range(row)] == [(key,) for key in damaged.clips.keys(range(row))]
    message = f"clip {place.key} in .*{place.shard} .*: run tavlad verify to see what else is damaged, and pack the set"
    with pytest.raises(BadClip, match=message):
        next(batches)


def test_missing_shard_stops_the_run_with_its_name(packed, copy_of_packed: Store) -> None:
    copy_of_packed.delete("shards/000002.tar")
    with pytest.raises(
        BadClip, match=r"clip .* in .*shards/000002\.tar cannot be read, the shard is missing: run tavlad"
    ):
        list(ClipLoader(packed.index, copy_of_packed, 1, "train", OPTIONS).epoch(0))


def test_index_of_another_set_stops_the_run(packed, numbered, tmp_path) -> None:
    from shards.plan import plan_packing

    store = open_store(str(tmp_path))
    other = numbered.pack(plan_packing(packed.videos, replace(packed.plan.options, jpeg_quality=60)), store)
    assert other.fingerprint != packed.index.fingerprint
    with pytest.raises(BadClip, match="clip "):
        list(ClipLoader(packed.index, store, 1, "train", OPTIONS).epoch(0))


def test_store_that_does_not_answer_is_no_bad_clip(packed, watched) -> None:
    class Unreachable(watched):
        def read_range(self, path: str, offset: int, length: int) -> bytes:
            raise StoreUnreachable("no S3 server answers")

    with pytest.raises(StoreUnreachable):
        list(ClipLoader(packed.index, Unreachable(packed.store), 1, "train", OPTIONS).epoch(0))


def test_frames_can_be_folded_into_images_without_a_copy(packed) -> None:
    batch = next(loader(packed).epoch(0))
    images = batch.frames_BTCHW.flatten(0, 1)
    assert images.data_ptr() == batch.frames_BTCHW.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("crop", 0), ("num_threads", -1), ("prefetch_batches", 0)]
)
def test_options_out_of_range_name_themselves(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}: choose"):
        replace(OPTIONS, **{field: value})


def test_reading_from_s3_is_the_same(packed, reference, local_s3) -> None:
    store = open_store("s3://tavlad/test_read", local_s3)
    for path in packed.store.list():
        store.write(path, packed.store.read(path))
    on_s3 = ClipLoader(packed.index, store, 1, "train", OPTIONS)
    assert same(list(on_s3.epoch(0)), reference[0])
    place = on_s3.clips.place(0)
    store.write(place.shard, packed.store.read(place.shard)[: place.offset + 100])
    with pytest.raises(BadClip, match=f"clip .* in .*{place.shard}"):
        list(ClipLoader(packed.index, store, 1, "train", OPTIONS).epoch(0))
    store.delete(place.shard)
    with pytest.raises(BadClip, match="the shard is missing"):
        list(ClipLoader(packed.index, store, 1, "train", OPTIONS).epoch(0))
