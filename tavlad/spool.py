"""What is still to be told to the tracking server, kept on this machine until it is told. Knows no MLflow.

A spool is a folder: `lines.jsonl` (one record a line, appended, never rewritten: also the local log of a run),
`delivered.json` (how far the lines were delivered), `files/` (copies of artifacts not yet delivered), `rejected.jsonl`
(records the server refused, with its reason) and `lock` (one process at a time).

Power may fail at any moment: what the mark says was delivered is on the disk before the mark is, and so is what a line
refers to before the line.
"""

import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tavlad.errors import UserError

Record = dict[str, Any]
"""One line: `kind` and what belongs to it, as JSON can hold it."""

MAX_PARAM_CHARACTERS = 6000
"""Longest parameter value an MLflow server takes."""
MAX_TAG_CHARACTERS = 5000
"""Longest tag value every MLflow store takes."""

_SECONDS_TO_WAIT_FOR_LOCK = 10.0
_CREDENTIAL_WORDS = re.compile(
    r"(?i)(?:^|[._/\- ])(?:password|passwd|secret|token|credentials?|authorization|api_?key|access_key(?:_id)?"
    r"|secret_key|secret_access_key|session_token|private_key)$"
)
_USER_IN_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)[^\s/@]+@")
_ALLOWED_NAME = re.compile(r"[\w./ \-]{1,250}")


class SpoolError(UserError):
    """The spool folder cannot be used."""


def check_name(kind: str, name: str) -> str:
    """Return `name`; ValueError when MLflow would refuse it as the name of a `kind` (metric, parameter, tag)."""
    if not _ALLOWED_NAME.fullmatch(name) or name.startswith(("/", ".")) or ".." in name or "//" in name:
        raise ValueError(
            f"{kind} name {name!r} is not one MLflow takes: use letters, digits and _ - . / only, at most 250 of them"
        )
    return name


def without_credentials(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as text, with what looks like a credential taken out: whole values by their name, users in URLs."""
    kept: dict[str, str] = {}
    for name, value in values.items():
        is_credential = _CREDENTIAL_WORDS.search(name) is not None
        kept[name] = "(not recorded)" if is_credential else without_user(str(value))
    return kept


def without_user(text: str) -> str:
    """`text` with `user:password@` removed from every URL in it."""
    return _USER_IN_URL.sub(r"\1", text)


def split_long(kind: str, values: Mapping[str, str], limit: int) -> tuple[dict[str, str], dict[str, str]]:
    """(values that fit, {artifact path: text} of those too long); a note takes the place of the latter."""
    fitting: dict[str, str] = {}
    texts: dict[str, str] = {}
    for name, value in values.items():
        if len(value) > limit:
            path = f"{kind}/{name}.txt"
            texts[path] = value
            value = f"({len(value)} characters, see artifact {path})"
        fitting[check_name(kind, name)] = value
    return fitting, texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How far a spool was delivered; written after every delivery."""

    offset: int = 0
    """Bytes of `lines.jsonl` that were delivered."""
    run_id: str | None = None
    """The run the next line belongs to."""
    postponed: tuple[Record, ...] = ()
    """Records before `offset` that are to be tried again: artifacts whose store did not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A record of the spool and where its line ends."""

    record: Record
    end: int


class Spool:
    """An append-only file of records and the mark of how far they were delivered; safe to use from two threads."""

    def __init__(self, folder: Path) -> None:
        """Open or create the spool at `folder` and hold it alone; SpoolError when another process keeps holding it."""
        self.folder = folder
        _make_folder(folder)
        self._lock_file = (folder / "lock").open("w")
        try:
            self._hold()
        except SpoolError:
            self._lock_file.close()
            raise
        self._path = folder / "lines.jsonl"
        self._drop_torn_line()
        self._lines = self._path.open("ab")
        _sync(folder)
        self._synced_to = 0  # what an earlier process wrote may wait for the disk still
        self._writing = threading.Lock()
        self.mark = self._read_mark()

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether a process holds the spool at `folder` now."""
        with (folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def append(self, record: Record, *, durable: bool = True) -> int:
        """Add one record and return where its line ends.

        `durable` waits until the disk has it: it then survives power loss, not only the end of the process.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._writing:
            self._lines.write(line)
            self._lines.flush()
            end = self._lines.tell()
            if durable:
                self._sync_lines(end)
            return end

    def undelivered(self, max_lines: int) -> list[Line]:
        """The first lines after the mark, at most `max_lines`."""
        lines: list[Line] = []
        with self._path.open("rb") as file:
            file.seek(self.mark.offset)
            while len(lines) < max_lines and (raw := file.readline()).endswith(b"\n"):
                lines.append(Line(record=json.loads(raw), end=file.tell()))
        return lines

    def set_mark(self, mark: Mark) -> None:
        """Remember how far the lines were delivered: whole, then visible."""
        with self._writing:
            if mark.offset > self._synced_to:
                self._sync_lines(self._lines.tell())
        new = self.folder / "delivered.json.new"
        with new.open("w") as file:
            json.dump(asdict(mark), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / "delivered.json")
        self.mark = mark

    def _read_mark(self) -> Mark:
        path = self.folder / "delivered.json"
        if not path.exists():
            return Mark()
        fields = json.loads(path.read_text())
        mark = Mark(offset=fields["offset"], run_id=fields["run_id"], postponed=tuple(fields["postponed"]))
        # Earlier code synced the mark before its lines: some of those may be lost, and others in their place. What
        # was told and is told again comes to the same.
        return mark if self._is_end_of_line(mark.offset) else replace(mark, offset=0, run_id=None)

    def _is_end_of_line(self, offset: int) -> bool:
        with self._path.open("rb") as file:
            file.seek(max(0, offset - 1))
            return offset == 0 or file.read(1) == b"\n"

    def _sync_lines(self, end: int) -> None:
        os.fsync(self._lines.fileno())
        self._synced_to = end

    def count_undelivered(self) -> int:
        """Number of records not yet delivered."""
        with self._path.open("rb") as file:
            file.seek(self.mark.offset)
            return sum(1 for _ in file) + len(self.mark.postponed)

    def keep_copy(self, source: Path) -> str:
        """Copy a file or folder into the spool and return the copy's path, relative to `files/`."""
        if not source.exists():
            raise FileNotFoundError(f"artifact {source} does not exist")
        place = self.folder / "files" / f"{time.time_ns()}"
        _make_folder(place)
        copy = place / source.name
        shutil.copytree(source, copy) if source.is_dir() else shutil.copyfile(source, copy)
        for path in (*copy.rglob("*"), copy, place):
            _sync(path)
        return f"{place.name}/{source.name}"

    def kept(self, copy: str) -> Path:
        """Path of a copy made by `keep_copy`."""
        return self.folder / "files" / copy

    def drop_copy(self, copy: str) -> None:
        """Remove a copy that was delivered."""
        shutil.rmtree(self.kept(copy).parent, ignore_errors=True)

    def reject(self, record: Record, reason: str) -> None:
        """Put a record aside that the server refused for good."""
        with (self.folder / "rejected.jsonl").open("a") as file:
            file.write(json.dumps({"reason": reason, "record": record}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(self.folder)

    def close(self) -> None:
        """Let go of the folder."""
        self._lines.close()
        self._lock_file.close()

    def _hold(self) -> None:
        deadline = time.monotonic() + _SECONDS_TO_WAIT_FOR_LOCK
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SpoolError(
                        f"spool folder {self.folder} is held by another process: end it, or give the run its own folder"
                    ) from None
                time.sleep(0.05)

    def _drop_torn_line(self) -> None:
        """Cut a last line that a killed process did not finish: nobody was told that it was kept."""
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def _make_folder(folder: Path) -> None:
    """Create a folder, and those above it, so that power loss does not take them away."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
