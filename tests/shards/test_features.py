"""Contract 3: features are written once, seen only whole, and never taken for those of something else."""

import io
import tarfile
from collections.abc import Callable

import numpy as np
import pytest

from shards.features import CENTRE_SLOT, SCHEMA, Entry, FeatureSet, FeatureTable, fingerprint, other_sets
from shards.store import Store, open_store
from shards.transforms import VIEWS, views_of
from tavlad.clip import BadClip
from tests.shards.conftest import PowerCut, WatchedStore

FACTS = {
    "name": "set",
    "dataset": "d",
    "weights": "w",
    "dtype": "float16",
    "num_frames": 2,
    "size": 3,
    "height": 2,
    "width": 2,
}


def _entry(row: int, slot: int, rounding: float = 0.0) -> Entry:
    """What a clip's features are; each of two GPUs may round them its own way."""
    values = np.arange(2 * 3 * 2 * 2, dtype=np.float16).reshape(2, 3, 2, 2) + row
    return Entry(values, np.full((2, 2, 2), slot + rounding, dtype=np.float32))


def _fill(features: FeatureSet, index, split: int, num_views: int, at_most: int | None = None) -> None:
    for shard in features.missing(features.plan(index, split, num_views))[:at_most]:
        features.write_shard(index, shard, (_entry(row, shard.slot) for row in shard.rows))
    if at_most is None:
        features.publish(index, split, num_views)


def _everything(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


@pytest.fixture
def features(tmp_path) -> FeatureSet:
    return FeatureSet(open_store(str(tmp_path / "features")), FACTS)


def test_every_view_of_a_split_is_there_and_is_what_was_written(features, packed) -> None:
    index = packed.index
    _fill(features, index, 1, 3)
    rows = features.filled(1, 3)
    assert rows is not None
    row_in_set = {key: row for row, key in enumerate(index.clips_table.keys())}
    for part, slots in (("train", range(3)), ("test", [CENTRE_SLOT])):
        clips = index.clips(1, part)
        table = FeatureTable(clips, rows)
        for row, key in enumerate(clips.keys()):
            assert [slot for slot in range(CENTRE_SLOT + 1) if table.place(row, slot) is not None] == list(slots)
            for slot in slots:
                place = table.place(row, slot)
                assert place is not None
                found, expected = features.read(place), _entry(row_in_set[key], slot)
                np.testing.assert_array_equal(found.map_TDHW, expected.map_TDHW)
                np.testing.assert_array_equal(found.activation_THW, expected.activation_THW)


def test_shards_are_plain_tars_of_npy_files(features, packed) -> None:
    _fill(features, packed.index, 1, 1)
    name = features.store.list("shards/")[0]
    with tarfile.open(fileobj=io.BytesIO(features.store.read(name))) as tar:
        members = tar.getmembers()
        first = tar.extractfile(members[0])
        assert first is not None
        map_TDHW = np.load(io.BytesIO(first.read()), allow_pickle=False)
    assert [member.name.partition(".")[2] for member in members[:2]] == ["map.npy", "activation.npy"]
    assert map_TDHW.dtype == np.float16
    assert map_TDHW.shape == (2, 3, 2, 2)


def test_splits_share_what_they_both_need(features, packed) -> None:
    plans = [features.plan(packed.index, split, 2) for split in (1, 2)]
    by_name = [{shard.name: shard.rows for shard in plan} for plan in plans]
    shared = by_name[0].keys() & by_name[1].keys()
    assert shared
    assert all(by_name[0][name] == by_name[1][name] for name in shared)
    _fill(features, packed.index, 1, 2)
    assert {shard.name for shard in features.missing(plans[1])} == by_name[1].keys() - shared


def test_filling_cut_off_twice_ends_as_one_that_was_not(packed, tmp_path, watched) -> None:
    whole = FeatureSet(open_store(str(tmp_path / "whole")), FACTS)
    _fill(whole, packed.index, 1, 2)
    store = open_store(str(tmp_path / "cut"))
    for writes in (5, 8):  # a shard takes two: the last is then a shard without its part
        with pytest.raises(PowerCut):
            _fill(FeatureSet(watched(store, writes_until_power_cut=writes), FACTS), packed.index, 1, 2)
        assert FeatureSet(store, FACTS).filled(1, 2) is None
    _fill(FeatureSet(store, FACTS), packed.index, 1, 2)
    assert _everything(store) == _everything(whole.store)


class _Overtaken(WatchedStore):
    """A filler's store; another one does the same shard, all of it, before the filler's n-th write."""

    def __init__(self, store: Store, writes: int, other: Callable[[], None]) -> None:
        super().__init__(store)
        self._writes = writes
        self._other = other

    def _count(self, path: str) -> None:
        if len(self.writes) == self._writes:
            self._other()
        super()._count(path)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_of_two_fillers_of_a_shard_one_is_read(features, packed, writes: int) -> None:
    (shard, *_) = features.plan(packed.index, 1, 1)

    def write(store: Store, rounding: float) -> None:
        entries = (_entry(row, shard.slot, rounding) for row in shard.rows)
        FeatureSet(store, FACTS).write_shard(packed.index, shard, entries)

    write(_Overtaken(features.store, writes, lambda: write(features.store, 0.25)), 0.5)
    table = FeatureTable(packed.index.clips_table, features.found(1, 1))
    places = [table.place(row, shard.slot) for row in shard.rows]
    read = [features.read(place) for place in places if place is not None]
    (rounding,) = {float(each.activation_THW[0, 0, 0]) - shard.slot for each in read}
    assert len(read) == len(shard.rows)
    assert rounding in (0.25, 0.5)
    assert features.store.list("shards/") == [places[0].shard], "what the other wrote is removed"


def test_shard_without_its_part_is_not_read(features, packed) -> None:
    plan = features.plan(packed.index, 1, 1)
    _fill(features, packed.index, 1, 1, at_most=2)
    features.store.delete(f"parts/{plan[0].name}.parquet")
    (found,) = features.found(1, 1)["shard"].unique().to_pylist()
    assert found.startswith(f"shards/{plan[1].name}-")
    assert plan[0] in features.missing(plan)


def test_what_trainings_left_is_found_until_the_split_is_filled(features, packed) -> None:
    key = packed.index.clips(1, "train").key(0)
    through = features.through()
    through.add(key, 7, _entry(1, 7))
    assert features.found(1, 8).num_rows == 0  # not before it is flushed
    through.flush()
    through.flush()
    assert features.found(1, 8)["slot"].to_pylist() == [7]
    assert features.filled(1, 8) is None


@pytest.mark.parametrize("rounding", [0.0, 0.5])
@pytest.mark.parametrize("expired", ["shards/", "shards/00000", "parts/", "parts/00000", "split", "facts", ""])
def test_what_a_bucket_let_expire_is_missing_and_filled_again(features, packed, expired: str, rounding: float) -> None:
    """A bucket's rule removes each object when it is so many days old."""
    index = packed.index
    _fill(features, index, 1, 2)
    plan = features.plan(index, 1, 2)
    gone = {path for path in features.store.list(expired) if path}
    for path in gone:
        features.store.delete(path)
    is_whole = not expired.startswith(("shards/", "split")) and expired != ""
    assert (features.filled(1, 2) is not None) == is_whole
    num_gone = sum(len(shard.rows) for shard in features.missing(plan)) if not is_whole else 0
    assert features.found(1, 2).num_rows == sum(len(shard.rows) for shard in plan) - num_gone
    assert num_gone > 0 or expired in ("split", "facts") or expired.startswith("parts/")

    for shard in features.missing(plan):
        features.write_shard(index, shard, (_entry(row, shard.slot, rounding) for row in shard.rows))
    features.publish(index, 1, 2)
    rows = features.filled(1, 2)
    assert rows is not None
    assert rows.num_rows == sum(len(shard.rows) for shard in plan)
    table = FeatureTable(index.clips_table, rows)
    for shard in plan:
        for row in shard.rows:
            place = table.place(row, shard.slot)
            assert place is not None
            np.testing.assert_array_equal(features.read(place).map_TDHW, _entry(row, shard.slot).map_TDHW)


def test_what_a_training_left_and_a_bucket_let_expire_is_not_found(features, packed) -> None:
    key = packed.index.clips(1, "train").key(0)
    for slot in (7, 8):
        through = features.through()
        through.add(key, slot, _entry(1, slot))
        through.flush()
    (shard,) = {row["shard"] for row in features.found(1, 8).to_pylist() if row["slot"] == 7}
    features.store.delete(shard)
    assert features.found(1, 8)["slot"].to_pylist() == [8]


def test_fewer_views_are_among_more(features, packed) -> None:
    _fill(features, packed.index, 1, 3)
    assert features.filled(1, 2) is not None
    assert features.filled(1, 4) is None
    assert sorted(VIEWS.index(view) for view in views_of("any")) == list(range(len(VIEWS)))
    assert views_of("any") != views_of("other")


def test_features_of_something_else_are_refused_by_field(features, packed, tmp_path) -> None:
    _fill(features, packed.index, 1, 1)
    other = {**FACTS, "weights": "others", "dtype": "float32"}
    assert fingerprint(other) != fingerprint(FACTS)
    with pytest.raises(ValueError, match=r"weights \(w, not others\), dtype \(float16, not float32\)"):
        FeatureSet(features.store, other).filled(1, 1)
    with pytest.raises(ValueError, match="weights"):
        FeatureSet(features.store, other).through()
    (line,) = other_sets(open_store(str(tmp_path)), other)
    assert "weights (w, not others)" in line
    assert not list(other_sets(open_store(str(tmp_path)), FACTS))
    assert not list(other_sets(open_store(str(tmp_path)), {**other, "name": "another set"}))


def test_flipped_byte_stops_with_the_clips_name_and_the_remedy(features, packed) -> None:
    _fill(features, packed.index, 1, 1)
    clips = packed.index.clips(1, "train")
    place = FeatureTable(clips, features.found(1, 1)).place(0, 0)
    assert place is not None
    content = bytearray(features.store.read(place.shard))
    content[place.offset + 700] ^= 1
    features.store.write(place.shard, bytes(content))
    with pytest.raises(BadClip, match="tavlad features fills it again") as caught:
        features.read(place)
    assert place.key in str(caught.value)
    features.store.write(place.shard, bytes(content[: place.offset + 10]))
    with pytest.raises(BadClip, match="cannot be read"):
        features.read(place)


def test_empty_set_has_no_rows(features, packed) -> None:
    assert features.found(1, 1).schema == SCHEMA
    assert FeatureTable(packed.index.clips(1, "train"), features.found(1, 1)).place(0, 0) is None
