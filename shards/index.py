"""index.parquet: the one description of a shard set. Its presence is what makes the set exist."""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from pyarrow.compute import call_function

from shards.store import Store
from tavlad.clip import Modality
from tavlad.errors import UserError

FORMAT = 1
INDEX_PATH = "index.parquet"
REJECTED_PATH = "rejected.parquet"
NUM_SPLITS = 3
_NEAREST = 3  # names of sets that are told where one is not known

Part = Literal["train", "test", "unused"]
Splits = tuple[Part, Part, Part]

_METADATA = b"tavlad"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("action", pa.string()),
        ("label", pa.int32()),
        ("split1", pa.string()),
        ("split2", pa.string()),
        ("split3", pa.string()),
        ("group", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.string()),
        ("num_source_frames", pa.int32()),
        ("source_fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
    ]
)
_DESCRIBED = {"name": str, "actions": list, "num_frames": int, "packing": dict, "plan": str, "fingerprint": str}
"""What the metadata of index.parquet says besides the format."""
REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string())])


class ClipPlace(NamedTuple):
    """Where one clip lies, and the digest its bytes must have."""

    key: str
    shard: str
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTable:
    """Rows of an index: columns, never an object a clip, so that ten million clips cost what their columns cost."""

    table: pa.Table
    labels_N: Int64[np.ndarray, " N"]

    @classmethod
    def of(cls, table: pa.Table) -> "ClipTable":
        """The columns of these rows, each in one piece, for quick access by row number."""
        labels_N = table["label"].to_numpy().astype(np.int64)
        return cls(table=table.combine_chunks(), labels_N=labels_N)

    def __len__(self) -> int:
        return self.table.num_rows

    def place(self, row: int) -> ClipPlace:
        """Where the clip of this row lies."""
        return ClipPlace(*(self.table[name][row].as_py() for name in ClipPlace._fields))

    def key(self, row: int) -> str:
        """Key of the clip of this row."""
        return self.table["key"][row].as_py()

    def keys(self, rows: Sequence[int] | Int64[np.ndarray, " N"] | None = None) -> list[str]:
        """Keys of these rows, or of all."""
        column = self.table["key"]
        return (column if rows is None else column.take(pa.array(rows))).to_pylist()

    def groups(self) -> list[str]:
        """Source group of each clip: clips of one group must not be on both sides of a validation split."""
        return self.table["group"].to_pylist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """A finished shard set."""

    name: str
    """Of the data set."""
    actions: tuple[str, ...]
    """Action names; a label is a position here."""
    num_frames: int
    """Frames per clip, T."""
    packing: Mapping[str, object]
    """The options the set was packed with."""
    plan: str
    """Fingerprint of what was to be packed: names, splits, sizes and ends of the videos, and the options."""
    fingerprint: str
    """Fingerprint of what was packed: the above and every clip's digest."""
    clips_table: ClipTable
    """All clips, in the order of the shards."""

    @property
    def modality(self) -> Modality:
        """What the clips' frames show."""
        return cast(Modality, self.packing.get("modality", "rgb"))

    def clips(self, split: int, part: Literal["train", "test", "all"]) -> ClipTable:
        """The clips of one part of split 1, 2 or 3, or all of the set, in the order of the shards."""
        if part == "all":
            return self.clips_table
        if split not in range(1, NUM_SPLITS + 1):
            raise ValueError(f"there is no split {split}: a set has splits 1, 2 and 3")
        assert part in ("train", "test"), part
        table = self.clips_table.table
        rows = rows_where(table, f"split{split}", part)
        if not rows.num_rows:
            raise UserError(f"split {split} of {self.name!r} has no {part} clips; choose a split that was packed")
        return ClipTable.of(rows)

    def decoded_bytes(self, clips: ClipTable) -> int:
        """Memory that the frames of these clips take, decoded."""
        width_N, height_N = (clips.table[name].to_numpy().astype(np.float64) for name in ("width", "height"))
        short_side = cast(int, self.packing["short_side"])
        shrunk_N = np.minimum(1.0, short_side / np.minimum(width_N, height_N))
        return int(3 * self.num_frames * (width_N * height_N * shrunk_N**2).sum())


def share_of(index: Index, share: float) -> Index:
    """A part of a set for rehearsals: of each action in each part of each split about this share, at least one clip.

    Which clips depends on their keys alone, so that a smaller share is a part of a larger one.
    """
    if share >= 1:
        return index
    table = index.clips_table.table
    keys = table["key"].to_pylist()
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    kept: set[int] = set()
    for split in range(1, NUM_SPLITS + 1):
        cells: dict[tuple[str, int], list[int]] = {}
        parts = table[f"split{split}"].to_pylist()
        for row in order:
            cells.setdefault((parts[row], int(index.clips_table.labels_N[row])), []).append(row)
        for rows in cells.values():
            kept.update(rows[: math.ceil(share * len(rows))])
    return replace(index, clips_table=ClipTable.of(table.take(pa.array(sorted(kept)))))


def rows_where(table: pa.Table, column: str, value: str) -> pa.Table:
    """The rows with this value, in their order."""
    return table.filter(call_function("equal", [table[column], pa.scalar(value)]))


def make_index(
    *, name: str, actions: Sequence[str], packing: Mapping[str, object], num_frames: int, plan: str, rows: pa.Table
) -> Index:
    """An index of these rows (schema `SCHEMA`), with the fingerprint of all of it."""
    described = {
        "format": FORMAT,
        "name": name,
        "actions": list(actions),
        "num_frames": num_frames,
        "packing": dict(packing),
        "plan": plan,
    }
    # A clip's digest covers its key, action, splits, group and frames: they are in its json member.
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for clip in rows["sha256"].to_pylist():
        digest.update(clip.encode())
    return Index(
        name=name,
        actions=tuple(actions),
        num_frames=num_frames,
        packing=dict(packing),
        plan=plan,
        fingerprint=digest.hexdigest(),
        clips_table=ClipTable.of(rows),
    )


def index_bytes(index: Index) -> bytes:
    """The content of index.parquet."""
    described = {
        "format": FORMAT,
        "name": index.name,
        "actions": list(index.actions),
        "num_frames": index.num_frames,
        "packing": dict(index.packing),
        "plan": index.plan,
        "fingerprint": index.fingerprint,
    }
    return table_bytes(index.clips_table.table, described)


def load_index(store: Store) -> Index:
    """The index of the set at `store`. ValueError if there is no finished set, or one of another format."""
    if not store.exists(INDEX_PATH):
        raise UserError(_why_no_set(store))
    table, described = read_table(store, INDEX_PATH)
    if described.get("format") != FORMAT:
        found = described.get("format", "unknown")
        raise UserError(f"{store.uri}/{INDEX_PATH} has format {found}, not {FORMAT}: pack the set again")
    lacking = [name for name, kind in _DESCRIBED.items() if not isinstance(described.get(name), kind)]
    lacking += [field.name for field in SCHEMA if field not in table.schema]
    if lacking:
        raise UserError(
            f"{store.uri}/{INDEX_PATH} lacks {', '.join(lacking)}: repair the set with its tavlad pack command and "
            "--repair"
        )
    return Index(
        name=described["name"],
        actions=tuple(described["actions"]),
        num_frames=described["num_frames"],
        packing=described["packing"],
        plan=described["plan"],
        fingerprint=described["fingerprint"],
        clips_table=ClipTable.of(table),
    )


def _why_no_set(store: Store) -> str:
    if store.list():
        return f"{store.uri} is not finished: packing was cut off: run its tavlad pack command again"
    *_, name = store.uri.split("/")
    # Folders without an index: sets that are being packed, and what S3 servers list although it was deleted.
    sets = [each for each, sibling in store.siblings().items() if sibling.exists(INDEX_PATH)]
    nearest = difflib.get_close_matches(name, sets, n=_NEAREST, cutoff=0.0)
    remedy = f"the nearest there: {', '.join(nearest)}" if nearest else "pack one there with tavlad pack"
    return f"there is no set at {store.uri}: {remedy}"


def table_bytes(table: pa.Table, described: Mapping[str, object]) -> bytes:
    """A Parquet file whose metadata says what it belongs to."""
    sink = pa.BufferOutputStream()
    metadata = {_METADATA: json.dumps(described, sort_keys=True).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_table(store: Store, path: str) -> tuple[pa.Table, dict[str, Any]]:
    """A table written by `table_bytes`, and what it says of itself."""
    content = store.read(path)
    try:
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)
        described = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:  # Arrow raises each of them for damaged files
        raise UserError(
            f"{store.uri}/{path} is not a Parquet file: repair the set with its tavlad pack command and --repair"
        ) from error
    return table, described if isinstance(described, dict) else {}
