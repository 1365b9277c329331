"""A run's checkpoints on the store: written whole, then made visible by one last object; the newest ones are kept."""

import hashlib
import json
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from shards.store import Store
from tavlad.errors import UserError

_COMPLETE = "complete.json"


class Checkpoints:
    """Checkpoint directories under one prefix; their names sort in the order of training.

    Each writer has a folder of its own below a checkpoint's name, and whoever completes it first, made it: a worker
    that was given up, behind a cut cable, say, and comes back, cannot mix its files with those of its successor.
    """

    def __init__(self, store: Store, keep: int = 2) -> None:
        self._store = store
        self._keep = keep
        self._writer = uuid.uuid4().hex[:12]

    def save(self, name: str, directory: Path) -> None:
        """Upload a checkpoint directory; it exists once all of it does. Older ones beyond `keep` are then removed."""
        digests: dict[str, str] = {}
        for path in sorted(directory.iterdir()):
            place = f"{self._writer}/{path.name}"
            self._store.upload(path, f"{name}/{place}")
            digests[place] = _sha256(path)
        self._store.write_if_absent(f"{name}/{_COMPLETE}", json.dumps(digests, indent=1).encode())
        for old in self.names()[: -self._keep]:
            self._remove(old)

    def names(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        suffix = f"/{_COMPLETE}"
        return sorted(path.removesuffix(suffix) for path in self._store.list() if path.endswith(suffix))

    def read(self, name: str, file: str) -> bytes:
        """One file of a whole checkpoint."""
        digests: dict[str, str] = json.loads(self._store.read(f"{name}/{_COMPLETE}"))
        (place,) = [place for place in digests if place.endswith(f"/{file}")]
        return self._store.read(f"{name}/{place}")

    def fetch(self, name: str, directory: Path) -> None:
        """Download a checkpoint and check it against its digests."""
        digests: dict[str, str] = json.loads(self._store.read(f"{name}/{_COMPLETE}"))
        directory.mkdir(parents=True, exist_ok=True)
        for place, digest in digests.items():
            file = directory / place.rpartition("/")[2]
            self._store.download(f"{name}/{place}", file)
            if _sha256(file) != digest:
                raise UserError(
                    f"{self._store.uri}/{name}/{place} is damaged (its SHA-256 differs): delete the checkpoint "
                    f"{self._store.uri}/{name} and run again; training goes on from the one before"
                )

    def remove_all(self) -> None:
        """No checkpoint is left, whole or half written."""
        for name in {path.partition("/")[0] for path in self._store.list()}:
            self._remove(name)

    def _remove(self, name: str) -> None:
        # What makes it visible goes first: a checkpoint half removed is none.
        self._store.delete(f"{name}/{_COMPLETE}")
        for path in self._store.list(f"{name}/"):
            self._store.delete(path)


class BackgroundWriter:
    """Does what it is handed in order, in a thread, one thing ahead at most: training waits only for a store that is
    slower than the time between two checkpoints."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Hand over; raises what the write before raised."""
        self.wait()
        self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Until everything is written; raises what a write raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
