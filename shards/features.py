"""A feature set (contract 3): what the frozen part of a trunk makes of a set's clips, computed once for all epochs,
trials and runs.

facts.json               what the features are of; sets that differ in any of it are different sets
shards/BBBBB-SS-ID.tar   plain WebDataset, KEY@SS.map.npy and KEY@SS.activation.npy: a block of clips in view slot SS
parts/BBBBB-SS.parquet   the shard's rows, written after it: a shard without its part does not exist
split1-8views.parquet    all rows that split 1 needs for 8 views a clip, written last: what is filled
through/ID.tar, .parquet the same for entries that trainings computed on their way, before the set was filled

A block holds clips that are on the same side of every split, so that the splits share shards and no view is computed
for a split that does not need it. A shard's ID is the digest of what it holds: two fillers whose GPUs round
differently write two shards, and the part names the one whose filler was first. Sets of earlier versions have shards
without an ID; rows say where their shard is.

A bucket may let objects expire, each when it is so many days old. A row whose shard is gone counts for nothing, and a
split of which anything is gone is not filled.
"""

import contextlib
import hashlib
import io
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int32
from pyarrow.compute import call_function

from shards.clip_bytes import END_OF_SHARD, read_tar_members, tar_members
from shards.disk_cache import DiskCache
from shards.index import NUM_SPLITS, ClipPlace, ClipTable, Index, read_table, table_bytes
from shards.store import MissingObject, Store, StoreError
from shards.transforms import VIEWS
from tavlad.clip import BadClip, FeatureKind
from tavlad.errors import UserError

EARLY_MAP = "early"
"""The fact "map" of a set that holds the maps below the last block."""
CENTRE_SLOT = len(VIEWS)
"""The slot of the view that models are tested on; the ones before it are a clip's own order of the forty."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("slot", pa.int16()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.string()),
    ]
)
_FACTS = "facts.json"
_SHARD_BYTES = 64_000_000
_FEWEST_BLOCKS = 8  # of a small set, so that it too is filled in parallel

Facts = Mapping[str, str | int]


class Entry(NamedTuple):
    """The features of one clip in one view."""

    map_TDHW: Float[np.ndarray, "T D h w"]
    activation_THW: Float[np.ndarray, "T h w"] | None
    """None where there is none, or where the trunk that makes it still learns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureShard:
    """One shard to fill: some clips in one slot."""

    block: int
    slot: int
    rows: tuple[int, ...]
    """Of the set's index."""

    @property
    def name(self) -> str:
        """Of its files, without folder and suffix."""
        return f"{self.block:05d}-{self.slot:02d}"


class FeatureTable:
    """Where the features of some clips are, by the clip's row and slot."""

    def __init__(self, clips: ClipTable, rows: pa.Table) -> None:
        self._rows = rows.combine_chunks()
        self._where = np.full((len(clips), CENTRE_SLOT + 1), -1, dtype=np.int32)
        keys = _value_set(clips.table["key"].combine_chunks())
        clip_rows = call_function("index_in", [rows["key"]], options=keys).fill_null(-1).to_numpy()
        known = clip_rows >= 0
        self._where[clip_rows[known], rows["slot"].to_numpy()[known]] = np.flatnonzero(known)

    def place(self, row: int, slot: int) -> ClipPlace | None:
        """Where the features of a clip in a slot are; None if they are not there."""
        found = int(self._where[row, slot])
        if found < 0:
            return None
        return ClipPlace(*(self._rows[name][found].as_py() for name in ClipPlace._fields))

    @property
    def present(self) -> Int32[np.ndarray, "N slots"]:
        """Row of each clip and slot in the table, -1 where there is none."""
        return self._where


class FeatureSet:
    """The feature set at a store. It holds no connection and can be sent to other processes."""

    def __init__(self, store: Store, facts: Facts) -> None:
        self.store = store
        self.facts = dict(facts)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored maps."""
        return np.dtype(str(self.facts["dtype"]))

    @property
    def kind(self) -> FeatureKind:
        """Which of the trunk's maps they are."""
        return "early" if self.facts.get("map") == EARLY_MAP else "last"

    def plan(self, index: Index, split: int, num_views: int) -> list[FeatureShard]:
        """The shards that a split needs: `num_views` views of its training clips, the centre view of its test clips."""
        shards: list[FeatureShard] = []
        for number, (parts, rows) in enumerate(_blocks(index, self.entry_bytes)):
            slots = {"train": range(num_views), "test": [CENTRE_SLOT]}.get(parts[split - 1], [])
            shards += [FeatureShard(block=number, slot=slot, rows=rows) for slot in slots]
        return sorted(shards, key=lambda shard: (shard.slot, shard.block))

    @property
    def entry_bytes(self) -> int:
        """Bytes of one clip in one view, about."""
        return math.prod(self.shape) * self.dtype.itemsize + math.prod(self.activation_shape) * 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """T, D, h, w of an entry's map."""
        frames, size, height, width = (int(self.facts[name]) for name in ("num_frames", "size", "height", "width"))
        return frames, size, height, width

    @property
    def activation_shape(self) -> tuple[int, int, int]:
        """T, h, w of an entry's activation: those of its map, unless the facts say otherwise."""
        frames, _, height, width = self.shape
        facts = self.facts
        return frames, int(facts.get("activation_height", height)), int(facts.get("activation_width", width))

    def missing(self, shards: Sequence[FeatureShard]) -> list[FeatureShard]:
        """Those not yet written whole."""
        there = set(self.store.list("parts/"))
        paths = [path for path in map(_part_path, shards) if path in there]
        done = {path for path, rows in self._lasting(paths) if rows.num_rows}
        return [shard for shard in shards if _part_path(shard) not in done]

    def write_shard(self, index: Index, shard: FeatureShard, entries: Iterable[Entry]) -> None:
        """Write a shard's entries, in the order of its rows, and then make it visible."""
        keys = index.clips_table.keys(np.array(shard.rows))
        content = _Shard()
        for key, entry in zip(keys, entries, strict=True):
            content.add(key, shard.slot, entry)
        tar = content.tar()
        path, part = f"shards/{shard.name}-{hashlib.sha256(tar).hexdigest()[:16]}.tar", _part_path(shard)
        self.store.write(path, tar)
        if self.store.write_if_absent(part, content.rows(path)):
            return
        first = str(read_table(self.store, part)[0]["shard"][0].as_py())
        if not self.store.exists(first):  # it has expired
            self.store.write(part, content.rows(path))
        elif first != path:
            self.store.delete(path)

    def publish(self, index: Index, split: int, num_views: int) -> None:
        """Make the split's features visible as whole, instead of what has expired. All its shards must be written."""
        self._write_facts()
        tables = [read_table(self.store, _part_path(shard))[0] for shard in self.plan(index, split, num_views)]
        rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        self.store.write(_index_path(split, num_views), table_bytes(rows, {"facts": self.facts}))

    def filled(self, split: int, num_views: int) -> pa.Table | None:
        """All rows of a split with at least that many views a clip; None if that was not filled or is not all there."""
        paths = [_index_path(split, views) for views in range(num_views, len(VIEWS) + 1)]
        present = set(self.store.list("split"))
        for path in paths:
            if path in present:
                table, described = read_table(self.store, path)
                require_same(described["facts"], self.facts, self.store.uri)
                if _among(table, self._shards()).num_rows == table.num_rows:
                    return table
        return None

    def found(self, split: int, num_views: int) -> pa.Table:
        """Rows of what is there: the filled split or else every whole shard, and whatever trainings and sweeps left."""
        filled = self.filled(split, num_views)
        paths = [] if filled is not None else self.store.list("parts/")
        paths = [*paths, *(each for each in self.store.list("through/") if ".parquet" in each)]
        tables = [rows for _, rows in self._lasting(paths)]
        if filled is not None:
            tables.append(filled.replace_schema_metadata(None))
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def _lasting(self, paths: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Each of these tables, without the rows whose shard is gone."""
        there = self._shards() if paths else set[str]()
        for path in paths:
            with contextlib.suppress(MissingObject):  # the table itself has gone meanwhile
                yield path, _among(read_table(self.store, path)[0].replace_schema_metadata(None), there)

    def _shards(self) -> set[str]:
        return {*self.store.list("shards/"), *self.store.list("through/")}

    def read(self, place: ClipPlace, cache: DiskCache | None = None) -> Entry:
        """One entry, proved by its digest; from this node's disk where it is there. `MissingObject` if it expired."""
        members = cache.get(place.sha256) if cache else None
        if members is None:
            members = self._fetch(place)
            if cache:
                cache.put(place.sha256, members)
        map_npy, *activation_npy = read_tar_members(members)
        return Entry(_from_npy(map_npy), _from_npy(activation_npy[0]) if activation_npy else None)

    def _fetch(self, place: ClipPlace) -> bytes:
        try:
            members = self.store.read_range(place.shard, place.offset, place.length)
        except StoreError as error:
            if type(error) is not StoreError:
                raise
            raise BadClip(f"features {place.key} cannot be read ({error}): {self._remedy}") from error
        if hashlib.sha256(members).hexdigest() != place.sha256:
            where = f"{self.store.uri}/{place.shard}"
            raise BadClip(f"features {place.key} in {where} are not what was written: {self._remedy}")
        return members

    def through(self) -> "Through":
        """For a training that writes what it computes."""
        self._write_facts()
        return Through(self.store)

    @property
    def _remedy(self) -> str:
        return f"delete {self.store.uri}, and tavlad features fills it again"

    def _write_facts(self) -> None:
        content = json.dumps(self.facts, sort_keys=True, indent=1).encode()
        if not self.store.write_if_absent(_FACTS, content):
            require_same(json.loads(self.store.read(_FACTS)), self.facts, self.store.uri)


class Through:
    """Entries of one training, gathered to shards of their own; several trainings may write at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._shard = _Shard()

    def add(self, key: str, slot: int, entry: Entry) -> None:
        """Keep an entry; written with the next `flush`, or when there is enough for a shard."""
        self._shard.add(key, slot, entry)
        if self._shard.size >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self._shard.size:
            name = f"through/{uuid.uuid4().hex}"
            self._store.write(f"{name}.tar", self._shard.tar())
            self._store.write(f"{name}.parquet", self._shard.rows(f"{name}.tar"))
            self._shard = _Shard()


class _Shard:
    """A shard in the making."""

    def __init__(self) -> None:
        self._members: list[bytes] = []
        self._rows: list[dict[str, object]] = []
        self.size = 0

    def add(self, key: str, slot: int, entry: Entry) -> None:
        files = {"map.npy": _to_npy(entry.map_TDHW)}
        if entry.activation_THW is not None:
            files["activation.npy"] = _to_npy(entry.activation_THW)
        members = tar_members(f"{key}@{slot:02d}", files)
        digest = hashlib.sha256(members).hexdigest()
        place = {"offset": self.size, "length": len(members), "sha256": digest}
        self._rows.append({"key": key, "slot": slot, **place})
        self._members.append(members)
        self.size += len(members)

    def tar(self) -> bytes:
        return b"".join([*self._members, END_OF_SHARD])

    def rows(self, path: str) -> bytes:
        """The table of what is in it, once it is at a path."""
        rows = [{**row, "shard": path} for row in self._rows]
        return table_bytes(pa.Table.from_pylist(rows, schema=SCHEMA), {})


def fingerprint(facts: Facts) -> str:
    """Names a feature set."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def other_sets(root: Store, facts: Facts) -> Iterator[str]:
    """What distinguishes the feature sets below `root` that are of the same data set from one of these facts."""
    for path in root.list():
        if path.count("/") == 1 and path.endswith(f"/{_FACTS}"):
            found = json.loads(root.read(path))
            differing = _differences(found, facts)
            if found.get("name") == facts["name"] and differing:
                yield f"{root.uri}/{path.partition('/')[0]} differs in {differing}"


def require_same(found: Facts, wanted: Facts, uri: str) -> None:
    """ValueError naming the fields in which a set is not the one wanted."""
    differing = _differences(found, wanted)
    if differing:
        raise UserError(f"the features at {uri} are of something else: they differ in {differing}; delete them")


def _differences(found: Facts, wanted: Facts) -> str:
    names = [name for name in [*wanted, *(set(found) - set(wanted))] if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} ({found.get(name)}, not {wanted.get(name)})" for name in names)


def _blocks(index: Index, entry_bytes: int) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The parts that a block's clips have in the three splits, and their rows; a function of the index alone."""
    table = index.clips_table.table
    columns = [table[f"split{split}"].to_pylist() for split in range(1, NUM_SPLITS + 1)]
    classes: dict[tuple[str, ...], list[int]] = {}
    for row, parts in enumerate(zip(*columns, strict=True)):
        classes.setdefault(parts, []).append(row)
    length = max(1, min(_SHARD_BYTES // entry_bytes, -(-len(table) // _FEWEST_BLOCKS)))
    for parts, rows in sorted(classes.items()):
        for start in range(0, len(rows), length):
            yield parts, tuple(rows[start : start + length])


def _among(rows: pa.Table, shards: set[str]) -> pa.Table:
    """The rows whose shard is one of these."""
    known = call_function("is_in", [rows["shard"]], options=_value_set(pa.array(sorted(shards), pa.string())))
    return rows.filter(known)


def _value_set(values: pa.Array) -> object:
    from pyarrow.compute import SetLookupOptions

    return SetLookupOptions(value_set=values)


def _part_path(shard: FeatureShard) -> str:
    return f"parts/{shard.name}.parquet"


def _index_path(split: int, num_views: int) -> str:
    return f"split{split}-{num_views}views.parquet"


def _to_npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _from_npy(content: memoryview) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)
