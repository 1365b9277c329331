"""Temporary folders of processes that live, end well, and are killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shards.scratch import scratch

_HOLD = """
import sys
from shards.scratch import scratch
with scratch() as folder:
    (folder / "file").write_bytes(b"much")
    print(folder, flush=True)
    sys.stdin.read()
"""
_MANY = """
from shards.scratch import scratch
for number in range(200):
    with scratch() as folder:
        (folder / "file").write_text(str(number))
        assert (folder / "file").read_text() == str(number)
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, empty at first."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _holding() -> tuple["subprocess.Popen[str]", Path]:
    held = subprocess.Popen([sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    return held, Path(held.stdout.readline().strip())


def test_folder_of_a_killed_process_is_removed_by_the_next_one(folders: Path) -> None:
    killed, orphan = _holding()
    living, used = _holding()
    with killed, living:
        killed.kill()
        killed.wait()
        assert (orphan / "file").exists(), "nobody was there to remove it"
        with scratch() as folder:
            assert set(folders.iterdir()) == {used, folder}
            assert (used / "file").read_bytes() == b"much"
        living.communicate("")
    assert living.returncode == 0
    assert not list(folders.iterdir())


def test_what_fails_leaves_no_folder(folders: Path) -> None:
    def fail() -> None:
        with scratch() as folder:
            (folder / "below").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(folders.iterdir())


def test_a_link_is_not_followed(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch()
    (folders / "tavlad-scratch-link").symlink_to(elsewhere)
    with scratch():
        pass
    assert (elsewhere / "file").exists()


def test_processes_that_make_folders_all_the_time_keep_theirs(folders: Path) -> None:
    """A folder that is made and not locked yet looks like one of a killed process."""
    together = [subprocess.Popen([sys.executable, "-c", _MANY], stderr=subprocess.PIPE, text=True) for _ in range(6)]
    said = [each.communicate(timeout=60)[1] for each in together]
    assert [each.returncode for each in together] == [0] * 6, said
    assert not list(folders.iterdir())
