"""Harm and counting for packed sets; the sets themselves are in tests/fixtures_sets.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shards.store import Store, open_store
from tests.fixtures_sets import (
    PACK_OPTIONS,
    PackedSet,
    draw_number,
    make_folders,
    pack,
    read_number,
    write_numbered_video,
    write_video,
)


@pytest.fixture
def copy_of_packed(packed: PackedSet, tmp_path: Path) -> Store:
    """The packed set once more, to be damaged."""
    store = open_store(str(tmp_path / "copy"))
    for path in packed.store.list():
        store.write(path, packed.store.read(path))
    return store


@pytest.fixture(scope="session")
def numbered() -> "Numbered":
    """What makes and reads videos of numbers."""
    return Numbered()


class PowerCut(Exception):
    """The job ends here."""


class WatchedStore(Store):
    """A store that counts its reads and writes, and that can fail at a given write."""

    def __init__(self, store: Store, writes_until_power_cut: int | None = None) -> None:
        self.uri = store.uri
        self.reads: list[str] = []
        self.writes: list[str] = []
        self._store = store
        self._limit = writes_until_power_cut

    def read(self, path: str) -> bytes:
        self.reads.append(path)
        return self._store.read(path)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.reads.append(path)
        return self._store.read_range(path, offset, length)

    def write(self, path: str, data: bytes) -> None:
        self._count(path)
        self._store.write(path, data)

    def write_if_absent(self, path: str, data: bytes) -> bool:
        self._count(path)
        return self._store.write_if_absent(path, data)

    def exists(self, path: str) -> bool:
        return self._store.exists(path)

    def size(self, path: str) -> int:
        return self._store.size(path)

    def list(self, prefix: str = "") -> list[str]:
        return self._store.list(prefix)

    def siblings(self) -> dict[str, Store]:
        return self._store.siblings()

    def delete(self, path: str) -> None:
        self._count(path)
        self._store.delete(path)

    def upload(self, local: Path, path: str) -> None:
        self._count(path)
        self._store.upload(local, path)

    def download(self, path: str, local: Path) -> None:
        self._store.download(path, local)

    def child(self, path: str) -> Store:
        return self._store.child(path)

    def _count(self, path: str) -> None:
        if len(self.writes) == self._limit:
            raise PowerCut
        self.writes.append(path)


@pytest.fixture(scope="session")
def watched() -> type[WatchedStore]:
    """Makes a store that counts and fails."""
    return WatchedStore


class Numbered:
    """The functions above, for tests, which cannot import this file."""

    draw = staticmethod(draw_number)
    read = staticmethod(read_number)
    write: Callable[..., Path] = staticmethod(write_numbered_video)
    write_frames: Callable[..., Path] = staticmethod(write_video)
    pack = staticmethod(pack)
    folders = staticmethod(make_folders)
    options = PACK_OPTIONS
    power_cut = PowerCut
