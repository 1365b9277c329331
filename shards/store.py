"""Where shard sets, checkpoints and reports live: an S3 bucket or a folder, behind one small interface.

Everything the project stores goes through here, so that `s3://BUCKET/PREFIX` and a folder obey the same laws: an object
is either absent or whole, listings are sorted, errors are one sentence, and no secret is ever part of a text. The S3
kind is in s3_store.py and imported when first used: boto3 takes half a second, which `tavlad status` need not pay.
"""

import contextlib
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tavlad.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_TEMPORARY = ".tavlad-writing-"  # files of unfinished writes: never listed
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


class StoreError(UserError):
    """Something stored cannot be read or written; the message says what and what to do."""


class MissingObject(StoreError):
    """The object, folder or bucket named in the message does not exist."""


class AccessRefused(StoreError):
    """The store answered, and does not let us in."""


class StoreUnreachable(StoreError):
    """Nothing answers at the store's address, after retries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Access:
    """How to reach an S3 server. The secret is not part of the repr."""

    endpoint_url: str | None
    """`http://HOST:PORT` of the server; None is Amazon's own."""
    access_key: str
    """Empty, as the secret key: Amazon's client finds the keys of the machine's role by itself."""
    secret_key: str = field(repr=False)
    region: str = "us-east-1"

    @property
    def place(self) -> str:
        """The endpoint as error messages name it."""
        return self.endpoint_url or "Amazon S3"


class Store(ABC):
    """A prefix of a bucket, or a folder. Paths are relative, with `/`; an object is visible only once it is whole.

    A store holds no connection: it can be pickled, sent to other processes, and used by many threads at once.
    Every method raises `MissingObject`, `AccessRefused`, `StoreUnreachable`, or `StoreError` for the rest.
    """

    uri: str

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; an object that ends before is a `StoreError`."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces the object."""

    @abstractmethod
    def write_if_absent(self, path: str, data: bytes) -> bool:
        """Creates the object unless it exists; True if this call created it. Of many at once, one wins."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether the object is there. A missing bucket is an error, not False."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes in the object."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """All paths that start with `prefix`, at any depth, sorted, relative to this store."""

    @abstractmethod
    def siblings(self) -> dict[str, "Store"]:
        """The stores in the same folder by name, this one among them if it holds anything."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes the object; one that is absent is no error."""

    @abstractmethod
    def upload(self, local: Path, path: str) -> None:
        """Copies a file of this machine into the store."""

    @abstractmethod
    def download(self, path: str, local: Path) -> None:
        """Copies an object into a file of this machine."""

    @abstractmethod
    def child(self, path: str) -> "Store":
        """The store below `path`."""


def open_store(uri: str, s3: S3Access | None = None) -> Store:
    """The store at `s3://BUCKET/PREFIX` (which needs `s3`) or in a folder, which need not exist yet."""
    if "://" not in uri:
        return _FolderStore(uri=str(Path(uri).expanduser().absolute()))
    bucket, prefix = split_s3_uri(uri)
    if s3 is None:
        raise UserError(f"{uri} is on S3, and no S3 server is known here; choose a site, or give a folder")
    from shards.s3_store import S3Store

    return S3Store(uri=f"s3://{bucket}/{prefix}".rstrip("/"), access=s3)


def split_s3_uri(uri: str) -> tuple[str, str]:
    """`s3://BUCKET/a/b` -> ("BUCKET", "a/b"), checked."""
    scheme, _, place = uri.partition("://")
    if scheme != "s3":
        raise UserError(f"{uri!r} is neither s3://BUCKET/PREFIX nor a folder")
    bucket, _, prefix = place.partition("/")
    if not _BUCKET_NAME.fullmatch(bucket):
        raise UserError(f"{uri!r} does not name a bucket: write s3://BUCKET/PREFIX, the bucket in lower case")
    prefix = prefix.strip("/")
    return bucket, checked_path(prefix) if prefix else ""


def arrow_filesystem(uri: str, s3: S3Access | None = None) -> tuple["FileSystem", str]:
    """The same place for pyarrow and for Ray Train's storage: a filesystem, and the path in it."""
    store = open_store(uri, s3)
    if s3 is None or isinstance(store, _FolderStore):
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), store.uri
    from shards.s3_store import arrow_s3

    return arrow_s3(s3), store.uri.removeprefix("s3://")


def ensure_bucket(s3: S3Access, bucket: str) -> None:
    """Creates the bucket if it is not there. Also the proof that the server accepts our keys."""
    from shards.s3_store import create_bucket_if_absent

    create_bucket_if_absent(s3, bucket)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FolderStore(Store):
    uri: str

    def read(self, path: str) -> bytes:
        with self._errors(path):
            return self._path(path).read_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0
        with self._errors(path), self._path(path).open("rb") as file:
            file.seek(offset)
            return complete(file.read(length), length, f"{self.uri}/{path}", offset)

    def write(self, path: str, data: bytes) -> None:
        with self._errors(path):
            write_whole(self._path(path), lambda temporary: temporary.write_bytes(data))

    def write_if_absent(self, path: str, data: bytes) -> bool:
        with self._errors(path):
            return write_whole(self._path(path), lambda temporary: temporary.write_bytes(data), replace=False)

    def exists(self, path: str) -> bool:
        with self._errors(path):
            return self._path(path).is_file()

    def size(self, path: str) -> int:
        with self._errors(path):
            if not self._path(path).is_file():
                raise MissingObject(f"{self.uri}/{path} does not exist")
            return self._path(path).stat().st_size

    def list(self, prefix: str = "") -> list[str]:
        root = Path(self.uri)
        found: list[str] = []
        # Only folders that can hold the prefix are walked: a listing of one set does not touch its neighbours.
        for folder, _, names in os.walk(root / prefix.rpartition("/")[0]):
            paths = [Path(folder, name) for name in names if not name.startswith(_TEMPORARY)]
            found += [path.relative_to(root).as_posix() for path in paths]
        return sorted(path for path in found if path.startswith(prefix))

    def siblings(self) -> dict[str, Store]:
        parent = Path(self.uri).parent
        folders = sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
        return {folder.name: _FolderStore(uri=str(folder)) for folder in folders}

    def delete(self, path: str) -> None:
        with self._errors(path):
            self._path(path).unlink(missing_ok=True)

    def upload(self, local: Path, path: str) -> None:
        with self._errors(path):
            write_whole(self._path(path), lambda temporary: shutil.copyfile(local, temporary))

    def download(self, path: str, local: Path) -> None:
        with self._errors(path):
            write_whole(local, lambda temporary: shutil.copyfile(self._path(path), temporary))

    def child(self, path: str) -> "Store":
        return _FolderStore(uri=str(self._path(path)))

    def _path(self, path: str) -> Path:
        return Path(self.uri, checked_path(path))

    @contextlib.contextmanager
    def _errors(self, path: str) -> Generator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise MissingObject(f"{error.filename or f'{self.uri}/{path}'} does not exist") from error
        except PermissionError as error:
            message = f"no permission for {error.filename or f'{self.uri}/{path}'}: check the folder's owner and mode"
            raise AccessRefused(message) from error
        except OSError as error:
            raise StoreError(f"{self.uri}/{path}: {error.strerror or error}") from error


def checked_path(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
        raise UserError(f"{path!r} is not a path inside a store: it is empty, absolute, or has an empty, . or .. part")
    return path


def complete(data: bytes, length: int, place: str, offset: int) -> bytes:
    if len(data) != length:
        raise StoreError(
            f"{place} ends before the bytes asked of it ({length} from {offset}): "
            "it is damaged or not what the index describes"
        )
    return data


def write_whole(target: Path, fill: Callable[[Path], object], replace: bool = True) -> bool:
    """Fills a hidden neighbour, makes it durable, then gives it its name; False if it may not replace and exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        fill(temporary)
        _flush(temporary)
        if replace:
            temporary.replace(target)
        else:
            os.link(temporary, target)  # unlike a rename, fails if the name is taken
        _flush(target.parent)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
