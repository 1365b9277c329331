"""The node's cache: never a wrong clip, never above its size, whoever is killed, whatever the disk does."""

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards import disk_cache
from shards.disk_cache import DiskCache


def clip(number: int, size: int = 1000) -> tuple[str, bytes]:
    data = number.to_bytes(4, "big") * (size // 4)
    return hashlib.sha256(data).hexdigest(), data


def cache_of(folder: Path, max_bytes: int = 100_000, set_name: str = "a" * 64) -> DiskCache:
    return DiskCache(folder=folder, max_bytes=max_bytes, set_name=set_name)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "usage")


def test_clip_comes_back_and_others_do_not(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "new")
    assert cache.get(clip(1)[0]) is None
    cache.put(*clip(1))
    assert cache.get(clip(1)[0]) == clip(1)[1]
    assert cache.get(clip(2)[0]) is None
    assert pickle.loads(pickle.dumps(cache)).get(clip(1)[0]) == clip(1)[1]


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"x" + data[1:], lambda data: b""])
def test_damaged_file_is_removed_and_filled_again(tmp_path: Path, damage) -> None:
    cache = cache_of(tmp_path)
    cache.put(*clip(1))
    path = next(path for path in tmp_path.rglob("*") if path.name == clip(1)[0])
    path.write_bytes(damage(clip(1)[1]))
    assert cache.get(clip(1)[0]) is None
    assert not path.exists()
    cache.put(*clip(1))
    assert cache.get(clip(1)[0]) == clip(1)[1]


def test_size_is_kept_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, max_bytes=10_500)
    for number in range(30):
        cache.put(*clip(number))
    assert bytes_in(tmp_path) == 10_000
    assert [cache.get(clip(number)[0]) is not None for number in range(30)] == [True] * 10 + [False] * 20


def test_idle_sets_make_room_for_the_one_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_SECONDS_BETWEEN_COUNTS", 0.0)
    for name, age_s in (("old", 5000), ("older", 9000), ("busy", 0)):
        for number in range(3):
            cache_of(tmp_path, 9_500, name).put(*clip(number))
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    cache = cache_of(tmp_path, 9_500, "new")
    for number in range(10, 13):
        cache.put(*clip(number))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["busy", "new", "old"]
    for number in range(13, 20):
        cache.put(*clip(number))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["busy", "new"]
    assert bytes_in(tmp_path) == 9_000


def test_reading_a_set_keeps_it_from_being_idle(tmp_path: Path) -> None:
    cache_of(tmp_path, set_name="set").put(*clip(1))
    os.utime(tmp_path / "set", (0, 0))
    assert cache_of(tmp_path, set_name="set").get(clip(1)[0])
    assert time.time() - (tmp_path / "set").stat().st_mtime < 60


def test_set_that_is_being_filled_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first epoch reads nothing from the cache, and clips in folders that are there leave the set's as it is."""
    monkeypatch.setattr(disk_cache, "_SECONDS_BETWEEN_COUNTS", 0.0)
    first = clip(0)
    second = next(each for each in map(clip, range(1, 5000)) if each[0][:2] == first[0][:2])
    cache_of(tmp_path, 2_500, "filling").put(*first)
    os.utime(tmp_path / "filling", (time.time() - 5000,) * 2)
    cache_of(tmp_path, 2_500, "filling").put(*second)
    cache_of(tmp_path, 2_500, "another").put(*clip(5001))
    filling = cache_of(tmp_path, 2_500, "filling")
    assert filling.get(first[0])
    assert filling.get(second[0])


def test_disk_that_refuses_is_told_of_once(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(tmp_path)
    cache.put(*clip(0))

    def refuse(path: Path, data: bytes) -> int:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(disk_cache, "_SECONDS_BETWEEN_COUNTS", 0.0)
    with caplog.at_level(logging.WARNING):
        for number in range(1, 5):
            cache.put(*clip(number))
    assert [record.getMessage() for record in caplog.records] == [
        f"the clip cache in {tmp_path} cannot be used (No space left on device): reading goes on from the store"
    ]
    assert cache.get(clip(0)[0]) == clip(0)[1]
    assert bytes_in(tmp_path) == 1000
    monkeypatch.undo()
    with cache._ledger() as ledger:  # nothing of what failed counts
        assert ledger.taken == 1000


def test_full_file_system_does_not_stop_reading(tmp_path: Path) -> None:
    """On a real file system without room, where one can be mounted."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        cache = cache_of(tmp_path, max_bytes=10_000_000)
        for number in range(40):
            cache.put(*clip(number, 8000))
        found = [cache.get(clip(number, 8000)[0]) for number in range(40)]
        assert all(data in (None, clip(number, 8000)[1]) for number, data in enumerate(found))
        assert 0 < sum(data is not None for data in found) < 8
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_folder_that_cannot_be_made_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = cache_of(tmp_path / "file" / "cache")
    cache.put(*clip(1))
    assert cache.get(clip(1)[0]) is None
    assert len(caplog.records) == 1


_FILL = """
import hashlib, sys
from pathlib import Path
from shards.disk_cache import DiskCache

cache = DiskCache(folder=Path(sys.argv[1]), max_bytes=2_000_000, set_name="a" * 64)
clips = [number.to_bytes(4, "big") * 10_000 for number in range(100)]
digests = [hashlib.sha256(data).hexdigest() for data in clips]
print("filling", flush=True)
for number in range(int(sys.argv[2]), 1_000_000):
    cache.put(digests[number % 100], clips[number % 100])
    found = cache.get(digests[number * 7 % 100])
    assert found is None or found == clips[number * 7 % 100]
"""


def test_processes_killed_while_they_fill_leave_a_cache_that_is_right(tmp_path: Path) -> None:
    """Four fill the same clips at once and are killed, again and again."""
    cache = cache_of(tmp_path, max_bytes=2_000_000)
    found: dict[int, bytes | None] = {}
    for round_ in range(4):
        command = [sys.executable, "-c", _FILL, str(tmp_path)]
        fillers = [subprocess.Popen([*command, str(25 * each)], stdout=subprocess.PIPE) for each in range(4)]
        for filler in fillers:
            assert filler.stdout is not None
            assert filler.stdout.readline() == b"filling\n"
        time.sleep(0.01 * round_)
        for filler in fillers:
            assert filler.poll() is None, "it failed by itself"
            filler.kill()
            filler.communicate()
        found = {number: cache.get(clip(number, 40_000)[0]) for number in range(100)}
        assert all(data in (None, clip(number, 40_000)[1]) for number, data in found.items())
        assert bytes_in(tmp_path) <= 2_000_000 + 16 * 40_000  # unfinished files of the killed
    assert sum(data is not None for data in found.values()) > 10


def test_leftovers_of_the_killed_are_removed_in_time(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    cache.put(*clip(1))
    left = next(tmp_path.rglob(clip(1)[0])).parent / ".writing-0"
    left.write_bytes(b"half")
    assert disk_cache._size_of(tmp_path / "aaaaaaaaaaaaaaaa") == 1004
    os.utime(left, (0, 0))
    assert disk_cache._size_of(tmp_path / "aaaaaaaaaaaaaaaa") == 1000
    assert not left.exists()
