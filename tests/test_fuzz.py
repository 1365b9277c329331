"""Malformed tars, indexes, recipes and split files, by the hundred: each ends as a ValueError, quickly, and nothing is
written outside its folder. `make fuzz` tries 2,000 of each."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_jobs.recipe import load_recipe
from shards.archives import unpack
from shards.index import INDEX_PATH, SCHEMA, load_index, table_bytes
from shards.split_files import read_hmdb51, read_table_of_videos, read_ucf101
from shards.store import open_store

CASES = int(os.environ.get("TAVLAD_FUZZ_CASES", "50"))
fuzzed = settings(
    max_examples=CASES,
    deadline=5000,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
BYTES = st.binary(max_size=300)
NAMES = st.one_of(
    st.sampled_from(["../out", "/out", "a/../../out", "..", ".", "", "a\0b", "a" * 300, "\\..\\out", "~/out"]),
    st.text(max_size=20),
)


def clean(action: Callable[[Path], object], folder: Path) -> None:
    """Does it; a ValueError of one non-empty message is the only error, and nothing is made beside the folder."""
    around = set(folder.parent.iterdir())
    try:
        action(folder)
    except (UnicodeError, json.JSONDecodeError):
        pytest.fail("an error that says nothing to a user")
    except ValueError as error:
        if not str(error).strip():
            pytest.fail("an error without a word")
    assert set(folder.parent.iterdir()) == around
    assert not Path("/out").exists()


@fuzzed
@given(content=BYTES, head=st.sampled_from([b"", b"PK\x03\x04", b"Rar!\x1a\x07\x00", b"\x1f\x8b\x08"]))
def test_any_bytes_as_an_archive(content: bytes, head: bytes) -> None:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        (folder / "archive").write_bytes(head + content)
        clean(lambda at: unpack(at / "archive", at / "to"), folder)


@fuzzed
@given(
    members=st.lists(
        st.tuples(NAMES, st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]), BYTES),
        max_size=4,
    ),
    link=NAMES,
    flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6),
)
def test_tars_of_any_members_with_flipped_bytes(
    members: list[tuple[str, bytes, bytes]], link: str, flips: list[tuple[int, int]]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="replace") as file:
        for name, kind, content in members:
            member = tarfile.TarInfo(name.replace("\0", "") or "x")
            member.type, member.linkname = kind, link.replace("\0", "")
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            try:
                file.addfile(member, io.BytesIO(content))
            except UnicodeEncodeError:
                continue
    content = bytearray(buffer.getvalue())
    for position, value in flips:
        if position < len(content):
            content[position] = value
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        (folder / "archive").write_bytes(content)
        clean(lambda at: unpack(at / "archive", at / "to"), folder)


TOML = st.one_of(
    BYTES,
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.dictionaries(
        st.sampled_from(["dataset", "model", "training", "stage1", "resources", "modle"]),
        st.one_of(
            st.integers(),
            st.floats(),
            st.booleans(),
            st.text(st.characters(codec="ascii", exclude_characters="\x7f"), max_size=8),
            st.dictionaries(
                st.sampled_from(["epochs", "lr", "trunk", "num_clusters", "workers", "crop", "batch_size", "weights"]),
                st.one_of(st.integers(-5, 10**30), st.floats(), st.booleans(), st.sampled_from(["", "x", "../x"])),
                max_size=3,
            ),
        ),
        max_size=4,
    ).map(lambda tables: to_toml(tables).encode()),
)


def to_toml(tables: dict[str, object]) -> str:
    def value(each: object) -> str:
        return str(each) if isinstance(each, float) else json.dumps(each)

    plain = [f"{key} = {value(each)}" for key, each in tables.items() if not isinstance(each, dict)]
    for key, table in tables.items():
        if isinstance(table, dict):
            plain += [f"[{key}]", *(f"{name} = {value(each)}" for name, each in table.items())]
    return "\n".join(plain)


@fuzzed
@given(content=TOML, change=st.lists(st.text(max_size=20), max_size=2))
def test_recipes(content: bytes, change: list[str]) -> None:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        (folder / "recipe.toml").write_bytes(content)
        clean(lambda at: load_recipe(str(at / "recipe.toml"), change), folder)


LINES = st.lists(
    st.one_of(
        BYTES,
        st.tuples(NAMES, st.sampled_from([b" 0", b" 1", b" 2", b" 9", b"", b" 1 1"])).map(
            lambda pair: pair[0].encode("utf-8", "surrogatepass") + b".avi" + pair[1]
        ),
        st.sampled_from([b"1 hug", b"2 run", b"hug/a.avi 1", b"run/b.avi", b"path,action,split", b"a.avi,hug,train"]),
    ),
    max_size=6,
).map(b"\n".join)


@fuzzed
@given(first=LINES, second=LINES, third=LINES)
def test_split_files(first: bytes, second: bytes, third: bytes) -> None:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        for name, content in {
            "hug_test_split1.txt": first,
            "classInd.txt": first,
            "trainlist01.txt": second,
            "testlist01.txt": third,
            "table.csv": first,
            "table.parquet": second,
        }.items():
            (folder / name).write_bytes(content)
        for read in (
            read_hmdb51,
            read_ucf101,
            lambda at: read_table_of_videos(at / "table.csv"),
            lambda at: read_table_of_videos(at / "table.parquet"),
        ):
            clean(read, folder)


@fuzzed
@given(
    metadata=st.one_of(
        st.none(),
        BYTES,
        st.dictionaries(
            st.sampled_from(["format", "name", "actions", "num_frames", "packing", "plan", "fingerprint"]),
            st.one_of(st.none(), st.integers(), st.text(max_size=5), st.just(1)),
        ),
    ),
    columns=st.sets(st.sampled_from(SCHEMA.names)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
)
def test_indexes(metadata: object, columns: set[str], flips: list[tuple[float, int]]) -> None:
    schema = pa.schema([SCHEMA.field(name) for name in SCHEMA.names if name in columns])
    table = schema.empty_table()
    if isinstance(metadata, dict):
        content = bytearray(table_bytes(table, metadata))
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({b"tavlad": metadata} if metadata else None), sink)
        content = bytearray(sink.getvalue().to_pybytes())
    for share, value in flips:
        content[min(len(content) - 1, int(share * len(content)))] = value
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        (folder / INDEX_PATH).write_bytes(content)
        clean(lambda at: load_index(open_store(str(at))).clips(1, "train"), folder)


@fuzzed
@given(path=NAMES)
def test_paths_in_a_store(path: str) -> None:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        clean(lambda at: open_store(str(at)).write(path, b"x"), folder)
