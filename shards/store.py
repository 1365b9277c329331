"""Where shard sets, checkpoints and reports live: an S3 bucket or a folder, behind one small interface.

Everything the project stores goes through here, so that `s3://BUCKET/PREFIX` and a folder obey the same laws: an object
is either absent or whole, listings are sorted, errors are one sentence, and no secret is ever part of a text. The two
kinds stand side by side in one long file because each method is best read against its twin.
"""

import contextlib
import functools
import os
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from pyarrow import fs

_TEMPORARY = ".tavlad-writing-"  # files of unfinished writes: never listed
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_BODY_ATTEMPTS = 4  # boto3 retries requests, but not a body that breaks off while it is read
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "403", "401", "Unauthorized")


class StoreError(ValueError):
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
        raise ValueError(f"{uri} is on S3, and no S3 server is known here; choose a site, or give a folder")
    return _S3Store(uri=f"s3://{bucket}/{prefix}".rstrip("/"), access=s3)


def split_s3_uri(uri: str) -> tuple[str, str]:
    """`s3://BUCKET/a/b` -> ("BUCKET", "a/b"), checked."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        raise ValueError(f"{uri!r} is neither s3://BUCKET/PREFIX nor a folder")
    if not _BUCKET_NAME.fullmatch(parts.netloc):
        raise ValueError(f"{uri!r} does not name a bucket: write s3://BUCKET/PREFIX, the bucket in lower case")
    prefix = uri.removeprefix("s3://").removeprefix(parts.netloc).strip("/")
    return parts.netloc, _checked(prefix) if prefix else ""


def arrow_filesystem(uri: str, s3: S3Access | None = None) -> tuple[fs.FileSystem, str]:
    """The same place for pyarrow and for Ray Train's storage: a filesystem, and the path in it."""
    store = open_store(uri, s3)
    if isinstance(store, _FolderStore):
        return fs.LocalFileSystem(), store.uri
    assert isinstance(store, _S3Store)
    access = store.access
    endpoint = urlsplit(access.endpoint_url) if access.endpoint_url else None
    filesystem = fs.S3FileSystem(
        access_key=access.access_key,
        secret_key=access.secret_key,
        region=access.region,
        scheme=endpoint.scheme if endpoint else "https",
        endpoint_override=endpoint.netloc if endpoint else None,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=5),
        connect_timeout=5,
        request_timeout=60,
    )
    return filesystem, store.uri.removeprefix("s3://")


def ensure_bucket(s3: S3Access, bucket: str) -> None:
    """Creates the bucket if it is not there. Also the proof that the server accepts our keys."""
    store = _S3Store(uri=f"s3://{bucket}", access=s3)
    with store.errors(""):
        names = [entry["Name"] for entry in _client(s3).list_buckets()["Buckets"]]
        if bucket not in names:
            _client(s3).create_bucket(Bucket=bucket)


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
            return _complete(file.read(length), length, f"{self.uri}/{path}", offset)

    def write(self, path: str, data: bytes) -> None:
        with self._errors(path):
            _write_whole(self._path(path), lambda temporary: temporary.write_bytes(data))

    def write_if_absent(self, path: str, data: bytes) -> bool:
        with self._errors(path):
            return _write_whole(self._path(path), lambda temporary: temporary.write_bytes(data), replace=False)

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

    def delete(self, path: str) -> None:
        with self._errors(path):
            self._path(path).unlink(missing_ok=True)

    def upload(self, local: Path, path: str) -> None:
        with self._errors(path):
            _write_whole(self._path(path), lambda temporary: shutil.copyfile(local, temporary))

    def download(self, path: str, local: Path) -> None:
        with self._errors(path):
            _write_whole(local, lambda temporary: shutil.copyfile(self._path(path), temporary))

    def child(self, path: str) -> "Store":
        return _FolderStore(uri=str(self._path(path)))

    def _path(self, path: str) -> Path:
        return Path(self.uri, _checked(path))

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise MissingObject(f"{error.filename or f'{self.uri}/{path}'} does not exist") from error
        except PermissionError as error:
            message = f"no permission for {error.filename or f'{self.uri}/{path}'}: check the folder's owner and mode"
            raise AccessRefused(message) from error
        except OSError as error:
            raise StoreError(f"{self.uri}/{path}: {error.strerror or error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _S3Store(Store):
    uri: str
    access: S3Access

    def read(self, path: str) -> bytes:
        return self._get(path)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0
        if length == 0:
            return b""
        data = self._get(path, Range=f"bytes={offset}-{offset + length - 1}")
        return _complete(data, length, f"{self.uri}/{path}", offset)

    def write(self, path: str, data: bytes) -> None:
        with self.errors(path):
            _client(self.access).put_object(Bucket=self._bucket, Key=self._key(path), Body=data)

    def write_if_absent(self, path: str, data: bytes) -> bool:
        token = uuid.uuid4().hex
        place = {"Bucket": self._bucket, "Key": self._key(path)}
        with self.errors(path):
            try:
                _client(self.access).put_object(**place, Body=data, IfNoneMatch="*", Metadata={"writer": token})
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                    raise
                # A retried request may have been beaten by its own first attempt, whose answer was lost.
                return _client(self.access).head_object(**place)["Metadata"].get("writer") == token
        return True

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except MissingObject:
            self._check_bucket()
            return False
        return True

    def size(self, path: str) -> int:
        with self.errors(path):
            return int(_client(self.access).head_object(Bucket=self._bucket, Key=self._key(path))["ContentLength"])

    def list(self, prefix: str = "") -> list[str]:
        root = f"{self._prefix}/" if self._prefix else ""
        found: list[str] = []
        with self.errors(prefix):
            pages = _client(self.access).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=root + prefix):
                found += [entry["Key"].removeprefix(root) for entry in page.get("Contents", [])]
        return sorted(path for path in found if not path.endswith("/"))  # some writers leave folder markers

    def delete(self, path: str) -> None:
        with self.errors(path):
            _client(self.access).delete_object(Bucket=self._bucket, Key=self._key(path))

    def upload(self, local: Path, path: str) -> None:
        with self.errors(path):
            if not local.is_file():
                raise MissingObject(f"{local} does not exist")
            _client(self.access).upload_file(str(local), self._bucket, self._key(path), Config=_TRANSFER)

    def download(self, path: str, local: Path) -> None:
        def fetch(temporary: Path) -> None:
            _client(self.access).download_file(self._bucket, self._key(path), str(temporary), Config=_TRANSFER)

        with self.errors(path):
            _write_whole(local, fetch)

    def child(self, path: str) -> "Store":
        return _S3Store(uri=f"{self.uri}/{_checked(path)}", access=self.access)

    @property
    def _bucket(self) -> str:
        return split_s3_uri(self.uri)[0]

    @property
    def _prefix(self) -> str:
        return split_s3_uri(self.uri)[1]

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{_checked(path)}".lstrip("/")

    def _get(self, path: str, **options: str) -> bytes:
        for attempt in range(_BODY_ATTEMPTS):
            with self.errors(path):
                answer = _client(self.access).get_object(Bucket=self._bucket, Key=self._key(path), **options)
                try:
                    return answer["Body"].read()
                except HTTPClientError:
                    if attempt == _BODY_ATTEMPTS - 1:
                        raise
                    time.sleep(0.1 * 4**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _check_bucket(self) -> None:
        """HEAD answers have no body: only this tells a missing bucket from a missing object."""
        with self.errors(""):
            _client(self.access).list_objects_v2(Bucket=self._bucket, MaxKeys=1)

    @contextlib.contextmanager
    def errors(self, path: str) -> Iterator[None]:
        """Turns what boto3 raises into one sentence that names the place and the remedy."""
        place = f"{self.uri}/{path}".rstrip("/")
        try:
            yield
        except ClientError as error:
            raise _explained(error, place, self._bucket, self.access) from error
        except HTTPClientError as error:
            message = f"no S3 server answers at {self.access.place} (for {place}): check the address, and that it runs"
            raise StoreUnreachable(message) from error
        except (BotoCoreError, Boto3Error) as error:  # upload_file wraps the answer in an error of its own
            cause = error.__context__
            if isinstance(cause, ClientError):
                raise _explained(cause, place, self._bucket, self.access) from error
            raise StoreError(f"{place} at {self.access.place}: {error}") from error
        except OSError as error:
            raise StoreError(f"{place}: {error}") from error


_TRANSFER = TransferConfig(max_concurrency=4, multipart_threshold=32 << 20, multipart_chunksize=16 << 20)


def _client(access: S3Access) -> Any:
    return _client_of_process(access, os.getpid())


@functools.lru_cache(maxsize=16)
def _client_of_process(access: S3Access, process: int) -> Any:
    """One client for all threads of a process; a forked child must not share its parent's connections."""
    del process
    host = urlsplit(access.endpoint_url or "").hostname
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=64,
        # Servers other than Amazon's differ in the newer checksums; the index has a sha256 of every clip.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        proxies={} if host in ("127.0.0.1", "localhost", "::1") else None,
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=access.endpoint_url,
        aws_access_key_id=access.access_key,
        aws_secret_access_key=access.secret_key,
        region_name=access.region,
        config=config,
    )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _explained(error: ClientError, place: str, bucket: str, access: S3Access) -> StoreError:
    code = _code(error)
    if code == "NoSuchBucket":
        return MissingObject(f"bucket {bucket!r} does not exist at {access.place}: create it, or correct the site")
    if code in ("NoSuchKey", "NotFound", "404"):
        return MissingObject(f"{place} does not exist at {access.place}")
    if code in _REFUSED:
        return AccessRefused(
            f"{access.place} refused access to {place} ({code}): check the S3 access key and secret key of the site"
        )
    if code in ("InvalidRange", "416"):
        return StoreError(f"{place} ends before the bytes asked of it: it is damaged or not what the index describes")
    message = error.response.get("Error", {}).get("Message", "")
    return StoreError(f"{access.place} answered {code} for {place}: {message}")


def _checked(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
        raise ValueError(f"{path!r} is not a path inside a store: it is empty, absolute, or has an empty, . or .. part")
    return path


def _complete(data: bytes, length: int, place: str, offset: int) -> bytes:
    if len(data) != length:
        raise StoreError(
            f"{place} ends before the bytes asked of it ({length} from {offset}): "
            "it is damaged or not what the index describes"
        )
    return data


def _write_whole(target: Path, fill: Callable[[Path], object], replace: bool = True) -> bool:
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
