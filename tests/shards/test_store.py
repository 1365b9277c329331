"""The laws of a store, each over a folder and over a real S3 server."""

import os
import pickle
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from pyarrow.fs import FileSelector

from shards.s3_store import S3Store
from shards.store import (
    AccessRefused,
    MissingObject,
    S3Access,
    Store,
    StoreError,
    StoreUnreachable,
    arrow_filesystem,
    open_store,
)
from tavlad.errors import UserError


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, S3Access | None]:
    """An empty place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "place"), None
    return f"s3://tavlad/{uuid.uuid4().hex}", request.getfixturevalue("local_s3")


@pytest.fixture
def store(place: tuple[str, S3Access | None]) -> Store:
    return open_store(*place)


def test_what_is_written_is_read_back(store: Store) -> None:
    data = os.urandom(100_000)
    store.write("a/b c/ü.bin", data)
    assert store.read("a/b c/ü.bin") == data
    assert store.size("a/b c/ü.bin") == len(data)
    assert store.exists("a/b c/ü.bin")


def test_the_folders_beside_a_store_are_its_siblings(place: tuple[str, S3Access | None]) -> None:
    root = open_store(*place)
    assert root.child("one").siblings() == {}
    for path in ("one/deep/a", "two/a", "three/a", "file"):
        root.write(path, b"")
    siblings = root.child("absent").siblings()
    assert sorted(siblings) == sorted(root.child("one").siblings()) == ["one", "three", "two"]
    assert siblings["one"].list() == ["deep/a"]
    assert list(root.child("one/deep").siblings()) == ["deep"]


def test_a_second_write_replaces_the_first(store: Store) -> None:
    store.write("a", b"first")
    store.write("a", b"2nd")
    assert store.read("a") == b"2nd"


def test_a_range_is_exactly_the_bytes_asked_for(store: Store) -> None:
    store.write("a", b"0123456789")
    assert store.read_range("a", 3, 4) == b"3456"
    assert store.read_range("a", 9, 1) == b"9"
    assert store.read_range("a", 10, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(8, 3), (10, 1), (50, 5)])
def test_a_range_beyond_the_end_is_an_error_that_says_so(store: Store, offset: int, length: int) -> None:
    store.write("a", b"0123456789")
    with pytest.raises(StoreError, match="ends before the bytes asked of it"):
        store.read_range("a", offset, length)


def test_a_missing_object_is_named(store: Store, tmp_path: Path) -> None:
    attempts = (
        lambda: store.read("no/such"),
        lambda: store.read_range("no/such", 0, 1),
        lambda: store.size("no/such"),
        lambda: store.download("no/such", tmp_path / "got"),
    )
    for attempt in attempts:
        with pytest.raises(MissingObject, match="no/such does not exist"):
            attempt()
    assert not store.exists("no/such")
    assert not list(tmp_path.glob("*got*"))


def test_a_folder_of_objects_is_no_object(store: Store) -> None:
    store.write("a/b", b"x")
    assert not store.exists("a")
    with pytest.raises(MissingObject):
        store.size("a")
    with pytest.raises(StoreError):
        store.read("a")


def test_listings_are_sorted_relative_and_recursive(store: Store) -> None:
    for path in ("b", "a/2", "a/10", "a/x/1", "ab/1"):
        store.write(path, b"")
    assert store.list() == ["a/10", "a/2", "a/x/1", "ab/1", "b"]
    assert store.list("a/") == ["a/10", "a/2", "a/x/1"]
    assert store.list("a") == ["a/10", "a/2", "a/x/1", "ab/1"]
    assert store.list("zz/") == []
    assert store.child("a").list() == ["10", "2", "x/1"]


def test_an_empty_place_lists_nothing(store: Store) -> None:
    assert store.list() == []


def test_a_listing_has_more_objects_than_a_page(store: Store) -> None:
    paths = sorted(f"many/{number:04d}" for number in range(1_050))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: store.write(path, b""), paths))
    assert store.list("many/") == paths


def test_deleting_is_idempotent(store: Store) -> None:
    store.write("a", b"x")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_of_many_conditional_writes_one_wins(store: Store) -> None:
    def attempt(number: int) -> bool:
        return store.write_if_absent("claim", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    assert store.read("claim") == b"%d" % won.index(True)
    assert not store.write_if_absent("claim", b"late")


def test_files_travel_both_ways(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(40 << 20))  # more than one part of a multipart upload
    store.upload(source, "big/one.bin")
    store.download("big/one.bin", tmp_path / "new folder" / "copy.bin")
    assert (tmp_path / "new folder" / "copy.bin").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["copy.bin"]


def test_uploading_a_missing_file_names_it(store: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingObject, match=r"absent\.bin does not exist"):
        store.upload(tmp_path / "absent.bin", "a")


@pytest.mark.parametrize("path", ["", "/a", "a//b", "../a", "a/..", "a/./b", "a/"])
def test_paths_outside_the_store_are_refused(store: Store, path: str) -> None:
    for attempt in (store.read, store.exists, store.delete, store.child, lambda path: store.write(path, b"")):
        with pytest.raises(ValueError, match="is not a path inside a store"):
            attempt(path)


def test_a_child_is_a_store_below(store: Store) -> None:
    store.child("a/b").write("c", b"x")
    assert store.child("a").child("b").uri == f"{store.uri}/a/b"
    assert store.read("a/b/c") == b"x"


def test_a_store_travels_to_other_processes(store: Store) -> None:
    store.write("a", b"here")
    program = (
        "import pickle, sys; store = pickle.load(sys.stdin.buffer); store.write('b', store.read('a') + b' and there')"
    )
    subprocess.run([sys.executable, "-c", program], input=pickle.dumps(store), check=True)
    assert store.read("b") == b"here and there"


def test_32_threads_share_a_store(store: Store) -> None:
    store.write("a", bytes(range(256)))
    with ThreadPoolExecutor(32) as pool:
        read = pool.map(lambda number: store.read_range("a", number % 256, 1), range(512))
    assert [byte[0] for byte in read] == [number % 256 for number in range(512)]


def test_arrow_sees_the_same_objects(store: Store, place: tuple[str, S3Access | None]) -> None:
    store.write("a/b", b"from us")
    filesystem, root = arrow_filesystem(*place)
    with filesystem.open_input_file(f"{root}/a/b") as file:
        assert file.read() == b"from us"
    filesystem.create_dir(f"{root}/folder")
    with filesystem.open_output_stream(f"{root}/folder/c") as file:
        file.write(b"from arrow")
    assert store.read("folder/c") == b"from arrow"
    assert store.list() == ["a/b", "folder/c"]
    names = {info.base_name for info in filesystem.get_file_info(FileSelector(root, recursive=True)) if info.is_file}
    assert names == {"b", "c"}


def test_an_unfinished_write_is_invisible_and_leaves_the_old_object(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a", b"old")
    program = (
        "import os, sys; from shards import store\n"
        "def die(path): os._exit(9)\n"
        "store._flush = die\n"
        "store.open_store(sys.argv[1]).write('a', b'new')"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2  # what the dead process left behind
    assert store.list() == ["a"]
    assert store.read("a") == b"old"


def test_wrong_keys_are_refused_naming_the_server_and_no_secret(local_s3: S3Access, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for wrong in (replace(local_s3, secret_key="not-the-secret"), replace(local_s3, access_key="nobody")):
        store = open_store("s3://tavlad/x", wrong)
        attempts = (
            lambda store=store: store.read("a"),
            lambda store=store: store.exists("a"),
            lambda store=store: store.list(),
            lambda store=store: store.write("a", b"x"),
            lambda store=store: store.write_if_absent("a", b"x"),
            lambda store=store: store.upload(tmp_path / "file", "a"),
            lambda store=store: store.download("a", tmp_path / "got"),
        )
        for attempt in attempts:
            with pytest.raises(AccessRefused, match="check the S3 access key and secret key") as refusal:
                attempt()
            assert str(local_s3.endpoint_url) in str(refusal.value)
            assert wrong.secret_key not in str(refusal.value)


def test_a_missing_bucket_is_an_error_for_all_operations(local_s3: S3Access, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = open_store("s3://no-such-bucket/x", local_s3)
    attempts = (
        lambda: store.read("a"),
        lambda: store.exists("a"),
        lambda: store.list(),
        lambda: store.write("a", b"x"),
        lambda: store.write_if_absent("a", b"x"),
        lambda: store.upload(tmp_path / "file", "a"),
    )
    for attempt in attempts:
        with pytest.raises(MissingObject, match="bucket 'no-such-bucket' does not exist"):
            attempt()


@pytest.mark.slow  # it is asked again for some seconds
def test_a_server_that_does_not_answer_is_named(local_s3: S3Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.s3_store._PATIENCE_S", 1.0)
    store = open_store("s3://tavlad/x", replace(local_s3, endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreUnreachable, match=r"no S3 server answers at http://127\.0\.0\.1:9 "):
        store.read("a")


def test_the_secret_is_in_no_repr(local_s3: S3Access) -> None:
    assert local_s3.secret_key not in repr(local_s3)
    assert local_s3.secret_key not in repr(open_store("s3://tavlad/x", local_s3))


def test_s3_without_a_site_is_an_error() -> None:
    with pytest.raises(ValueError, match="choose a site, or give a folder"):
        open_store("s3://tavlad/x")


@pytest.mark.parametrize("uri", ["http://host/x", "s3://", "s3:///x", "s3://Big_Bucket/x", "file:///tmp/x", "s3://[x"])
def test_what_is_neither_bucket_nor_folder_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"s3://BUCKET/PREFIX"):
        open_store(uri, S3Access(endpoint_url=None, access_key="a", secret_key="b"))


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/a"):
        open_store(str(tmp_path / "file")).write("a", b"")


@pytest.mark.parametrize(("code", "kind"), [("SlowDown", StoreUnreachable), ("InvalidArgument", StoreError)])
def test_server_that_cannot_answer_now_is_told_from_one_that_answers(code: str, kind: type[StoreError]) -> None:
    access = S3Access(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key="b")
    store = S3Store(uri="s3://bucket/set", access=access)
    with pytest.raises(StoreError, match=code) as caught, store.errors("index.parquet"):
        raise ClientError({"Error": {"Code": code, "Message": "why"}}, "GetObject")
    assert type(caught.value) is kind
