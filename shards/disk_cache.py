"""Packed clips kept on a node's own disk, shared by all processes there, up to a size.

A clip is a file named by its digest, in a folder named by its set. Files appear whole (written beside, then renamed)
and are proved by their digest whenever they are read, so neither a killed process nor a failing disk can hand out a
wrong clip. What counts towards the size is kept in one file under a lock that the kernel frees with its process; it is
counted anew from the files whenever the room seems to be used up. Of a set in use nothing is evicted: an epoch visits
all its clips, so whichever are there are as useful as any others. Sets that nobody has read for a while make room.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

_log = logging.getLogger(__name__)
_LEDGER = "usage"  # bytes taken, and when they were last counted
_LEDGER_FORMAT = struct.Struct("<qd")
_WRITING = ".writing-"
_SECONDS_UNTIL_IDLE = 600.0  # a set not read for so long may be evicted, an unfinished file so old removed
_SECONDS_BETWEEN_COUNTS = 60.0
_SECONDS_BETWEEN_MARKS = 60.0
_FOLDER_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskCache:
    """The cache in a folder, for one set. It can be pickled; all that share the folder share its size."""

    folder: Path
    max_bytes: int
    """Of all sets in the folder together."""
    set_name: str
    """The set's fingerprint."""
    _state: "_ProcessState" = field(default_factory=lambda: _ProcessState(), repr=False, compare=False)

    def get(self, sha256: str) -> bytes | None:
        """The clip with this digest, or None; a file that is not what its name says is removed."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(error)
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self._mark()
        return data

    def has(self, sha256: str) -> bool:
        """Whether there is a clip with this digest, which need not be whole."""
        return self._path(sha256).exists()

    @property
    def takes_more(self) -> bool:
        """Whether there was room, and a disk that works, when something was last put."""
        return not self._state.is_waiting()

    def put(self, sha256: str, data: bytes | memoryview) -> None:
        """Keeps a clip if there is room. A disk that refuses it is told of once and asked again later."""
        if not self.takes_more:
            return
        path = self._path(sha256)
        temporary = path.parent / f"{_WRITING}{uuid.uuid4().hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._mark()
            if path.exists():
                return
            if not self._reserve(len(data)):
                self._state.wait()
                return
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            except OSError:
                self._add(-len(data))
                raise
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._state.wait()
            self._complain(error)

    def _mark(self) -> None:
        """Say that the set is in use. What fills it must say so too: its first epoch may find nothing for hours."""
        if self._state.is_due("mark", _SECONDS_BETWEEN_MARKS):
            with contextlib.suppress(OSError):
                os.utime(self._set_folder)

    def _reserve(self, num_bytes: int) -> bool:
        """Takes so many bytes of the room, if need be what idle sets have."""
        with self._ledger() as ledger:
            if ledger.taken + num_bytes > self.max_bytes:
                if abs(time.time() - ledger.counted) < _SECONDS_BETWEEN_COUNTS:
                    return False
                ledger.taken, ledger.counted = self._count_and_evict(num_bytes), time.time()
            has_room = ledger.taken + num_bytes <= self.max_bytes
            ledger.taken += num_bytes if has_room else 0
            return has_room

    def _add(self, num_bytes: int) -> None:
        with contextlib.suppress(OSError), self._ledger() as ledger:
            ledger.taken = max(0, ledger.taken + num_bytes)

    def _count_and_evict(self, num_bytes: int) -> int:
        """The bytes in the folder, after idle sets, the longest idle first, were removed as far as it takes."""
        sets = [entry for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False)]
        used_at = {entry.path: entry.stat().st_mtime for entry in sets}
        sizes = {path: _size_of(Path(path)) for path in used_at}
        taken = sum(sizes.values())
        for path in sorted(used_at, key=lambda each: used_at[each]):
            is_idle = time.time() - used_at[path] > _SECONDS_UNTIL_IDLE
            if taken + num_bytes <= self.max_bytes or not is_idle or Path(path) == self._set_folder:
                continue
            # A reader that has a file open keeps it; one that comes too late reads from the store.
            shutil.rmtree(path, ignore_errors=True)
            taken -= sizes[path]
        return taken

    @contextlib.contextmanager
    def _ledger(self) -> "Generator[_Ledger]":
        """The bytes taken, while no other process or thread may change them."""
        descriptor = os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = os.pread(descriptor, _LEDGER_FORMAT.size, 0)
            if len(content) == _LEDGER_FORMAT.size:
                ledger = _Ledger(*_LEDGER_FORMAT.unpack(content))
            else:
                ledger = _Ledger(self._count_and_evict(0), time.time())
            yield ledger
            os.pwrite(descriptor, _LEDGER_FORMAT.pack(ledger.taken, ledger.counted), 0)
        finally:
            os.close(descriptor)

    @property
    def _set_folder(self) -> Path:
        return self.folder / self.set_name[:_FOLDER_DIGITS]

    def _path(self, sha256: str) -> Path:
        return self._set_folder / sha256[:2] / sha256

    def _complain(self, error: OSError) -> None:
        if not self._state.has_complained:
            self._state.has_complained = True
            what = error.strerror or error
            _log.warning("the clip cache in %s cannot be used (%s): reading goes on from the store", self.folder, what)


@dataclass(slots=True)
class _Ledger:
    taken: int
    counted: float


class _ProcessState:
    """What one process remembers; each process starts with a state of its own."""

    def __init__(self) -> None:
        self.has_complained = False
        self._lock = threading.Lock()
        self._done_at: dict[str, float] = {}

    def is_due(self, what: str, seconds: float) -> bool:
        """Whether it was last due so many seconds ago; then it counts as done."""
        now = time.monotonic()
        with self._lock:
            if now - self._done_at.get(what, -seconds) < seconds:
                return False
            self._done_at[what] = now
            return True

    def wait(self) -> None:
        """Nothing is to be put for a while."""
        self._done_at["wait"] = time.monotonic()

    def is_waiting(self) -> bool:
        return time.monotonic() - self._done_at.get("wait", -_SECONDS_BETWEEN_COUNTS) < _SECONDS_BETWEEN_COUNTS

    def __reduce__(self) -> tuple[type["_ProcessState"], tuple[()]]:
        return _ProcessState, ()


def _size_of(folder: Path) -> int:
    """Bytes of the files below; unfinished files that nobody can still be writing are removed."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.name.startswith(_WRITING) and time.time() - status.st_mtime > _SECONDS_UNTIL_IDLE:
                path.unlink()
            elif path.is_file():
                size += status.st_size
    return size
