"""Temporary folders, of which a killed process leaves none for long: the next one that asks for a folder removes it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

_PREFIX = "tavlad-scratch-"


@contextlib.contextmanager
def scratch() -> Generator[Path]:
    """An empty folder below the temporary folder, for this user alone; removed at the end, with all that is in it.

    Its owner holds a lock on it, which the kernel frees with the process. Folders whose lock is free are removed first.
    """
    _remove_orphans(Path(tempfile.gettempdir()))
    folder, lock = _make()
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def _make() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Until it is locked it looks like an orphan: another process may have removed it.
        with contextlib.suppress(FileNotFoundError):
            lock = _open(folder)
            # Shared, because a network's file system may ask for more to lock a folder exclusively.
            fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_orphans(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process's, another user's, or gone by now
            lock = _open(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
