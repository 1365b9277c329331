"""The spool over the loss of power: what is kept is what was synced, and nothing that was told durably is lost."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tavlad.spool import Mark, Record, Spool


class Disk:
    """What a disk would hold if power failed now: of a file its content when it was synced, of a folder its names."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, set[str]] = {}
        self._fsync = os.fsync
        self.after_sync: Callable[[], None] = lambda: None
        patch.setattr(os, "fsync", self._note)

    def _note(self, file: int) -> None:
        self._fsync(file)
        place, inode = Path(f"/proc/self/fd/{file}"), os.fstat(file).st_ino
        if place.is_dir():
            self._names[inode] = {path.name for path in place.iterdir()}
        else:
            self._contents[inode] = place.read_bytes()
        self.after_sync()

    def fail(self, folder: Path, copy: Path, *, forgets_names: bool) -> None:
        """Leave at `copy` what is left of `folder`; with or without the names whose folder was not synced since."""
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        names = self._names.get(folder.stat().st_ino, set[str]())
        for entry in list(folder.iterdir()):
            if forgets_names and entry.name not in names:
                continue
            if entry.is_dir():
                self.fail(entry, copy / entry.name, forgets_names=forgets_names)
            else:
                (copy / entry.name).write_bytes(self._contents.get(entry.stat().st_ino, b""))


@pytest.fixture
def opened() -> Generator[Callable[[Path], Spool]]:
    """Opens spools that are closed with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda folder: stack.enter_context(contextlib.closing(Spool(folder)))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def metrics(step: int) -> Record:
    return {"kind": "metrics", "step": step, "time": 0, "values": {"train/loss": 1.0}}


Open = Callable[[Path], Spool]


def test_what_is_told_after_power_failed_is_delivered(opened: Open, disk: Disk, tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    spool.append({"kind": "run", "run": "run"})
    for step in range(5):
        spool.append(metrics(step), durable=False)
    for line in spool.undelivered(max_lines=100):
        spool.set_mark(Mark(offset=line.end, run_id="run"))
    disk.fail(tmp_path / "spool", tmp_path / "after", forgets_names=False)
    after = opened(tmp_path / "after")
    assert after.count_undelivered() == 0
    for step in range(5, 8):
        after.append(metrics(step))
    assert [line.record["step"] for line in after.undelivered(max_lines=100)] == [5, 6, 7]


def test_whenever_power_fails_no_line_is_behind_the_mark_and_what_was_told_durably_is_there(
    opened: Open, disk: Disk, tmp_path: Path
) -> None:
    root, after = tmp_path / "root", tmp_path / "after"
    folder = root / "plan" / "parent"
    root.mkdir()
    told, num_looks = list[Record](), 0

    def look() -> None:
        nonlocal num_looks
        for forgets_names in (False, True):
            disk.fail(root, after, forgets_names=forgets_names)
            left = after / "plan" / "parent"
            lines = (left / "lines.jsonl").read_bytes() if (left / "lines.jsonl").exists() else b""
            mark = (left / "delivered.json").read_text() if (left / "delivered.json").exists() else '{"offset": 0}'
            offset = json.loads(mark)["offset"]
            assert offset == 0 or lines[:offset][offset - 1 :] == b"\n"
            kept = [json.loads(line) for line in lines.splitlines()]
            assert all(record in kept for record in told)
            for copy in (record["copy"] for record in kept if record["kind"] == "artifact"):
                assert (left / "files" / copy).read_bytes() == b"a picture"
            if offset == len(lines) > 500:
                assert "refused" in (left / "rejected.jsonl").read_text()
        num_looks += 1

    disk.after_sync = look
    spool = opened(folder)
    (tmp_path / "a.png").write_bytes(b"a picture")
    for record in ({"kind": "run", "run": "run"}, metrics(0)):
        spool.append(record)
        told.append(record)
    for step in range(1, 10):
        spool.append(metrics(step), durable=False)
    artifact = {"kind": "artifact", "copy": spool.keep_copy(tmp_path / "a.png"), "path": None}
    spool.append(artifact)
    told.append(artifact)
    for line in spool.undelivered(max_lines=100):
        if line.record["kind"] == "artifact":
            spool.reject(line.record, "refused")
        spool.set_mark(Mark(offset=line.end, run_id="run"))
    look()
    assert num_looks > 15


def test_a_mark_that_does_not_fit_its_lines_tells_all_again(opened: Open, tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append({"kind": "run", "run": "run"})
    end = spool.append(metrics(0))
    postponed = {"kind": "text", "path": "a.txt", "text": "a", "run_id": "run"}
    for offset in (end + 40, end - 3):
        spool.set_mark(Mark(offset=offset, run_id="run", postponed=(postponed,)))
        spool.close()
        spool = opened(tmp_path)
        assert [line.record["kind"] for line in spool.undelivered(max_lines=100)] == ["run", "metrics"]
        assert spool.mark.postponed == (postponed,)
    spool.set_mark(Mark(offset=end, run_id="run"))
    spool.close()
    assert opened(tmp_path).count_undelivered() == 0
