"""The store in a bucket of an S3 server: boto3 for ourselves, pyarrow's filesystem for Ray Train."""

import contextlib
import functools
import itertools
import os
import random
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from pyarrow import fs

from shards.store import (
    AccessRefused,
    MissingObject,
    S3Access,
    Store,
    StoreError,
    StoreUnreachable,
    checked_path,
    complete,
    split_s3_uri,
    write_whole,
)

_CONNECT_TIMEOUT_S, _CONNECTIONS = 5, 64
_SECONDS_PER_SIGNATURE = 300
_READ_TIMEOUT_S = 60.0  # between two bytes of an answer
_PATIENCE_S = 60.0  # with a server that answers wrongly or not at all while something is read, or with a conflict
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "403", "401", "Unauthorized")
_CONFLICT = "ConditionalRequestConflict"  # two conditional writes of a key at the same time; nothing was written
_AILING = ("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "500", "502", "503", "504", _CONFLICT)
_TRANSFER = TransferConfig(max_concurrency=4, multipart_threshold=32 << 20, multipart_chunksize=16 << 20)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Store(Store):
    """A prefix of a bucket; see `Store`. The client is looked up at each call, so the store itself can be pickled."""

    uri: str
    access: S3Access

    def read(self, path: str) -> bytes:
        return self._get(path)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0
        if length == 0:
            return b""
        span = f"bytes={offset}-{offset + length - 1}"
        data = self._get_quickly(path, span)
        if data is None or len(data) != length:
            data = self._get(path, Range=span)
        return complete(data, length, f"{self.uri}/{path}", offset)

    def write(self, path: str, data: bytes) -> None:
        with self._errors_of_write(path):
            _client(self.access).put_object(Bucket=self._bucket, Key=self._key(path), Body=data)

    def write_if_absent(self, path: str, data: bytes) -> bool:
        token = uuid.uuid4().hex
        place = {"Bucket": self._bucket, "Key": self._key(path)}

        def put() -> None:
            _client(self.access).put_object(**place, Body=data, IfNoneMatch="*", Metadata={"writer": token})

        with self._errors_of_write(path):
            try:
                _patiently(put, lambda error: isinstance(error, ClientError) and _code(error) == _CONFLICT)
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
                # A retried request may have been beaten by its own first attempt, whose answer was lost.
                return _client(self.access).head_object(**place)["Metadata"].get("writer") == token
        return True

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except MissingObject:
            # Answers to HEAD have no body: only asking again tells a missing bucket from a missing object.
            with self.errors(path):
                _require_bucket(self.access, self._bucket, os.getpid())
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
                found += [entry["Key"] for entry in page.get("Contents", [])]
        # Arrow marks folders by objects whose names end in "/".
        return sorted(key.removeprefix(root) for key in found if not key.endswith("/"))

    def siblings(self) -> dict[str, Store]:
        parent, slash, _ = self._prefix.rpartition("/")
        prefixes: list[str] = []
        with self.errors(""):
            pages = _client(self.access).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=parent + slash, Delimiter="/"):
                prefixes += [entry["Prefix"].rstrip("/") for entry in page.get("CommonPrefixes", [])]
        return {
            prefix.removeprefix(parent + slash): S3Store(uri=f"s3://{self._bucket}/{prefix}", access=self.access)
            for prefix in prefixes
        }

    def delete(self, path: str) -> None:
        with self.errors(path):
            _client(self.access).delete_object(Bucket=self._bucket, Key=self._key(path))

    def upload(self, local: Path, path: str) -> None:
        with self._errors_of_write(path):
            if not local.is_file():
                raise MissingObject(f"{local} does not exist")
            _client(self.access).upload_file(str(local), self._bucket, self._key(path), Config=_TRANSFER)

    def download(self, path: str, local: Path) -> None:
        def fetch(temporary: Path) -> None:
            _client(self.access).download_file(self._bucket, self._key(path), str(temporary), Config=_TRANSFER)

        with self.errors(path):
            write_whole(local, fetch)

    def child(self, path: str) -> "Store":
        return S3Store(uri=f"{self.uri}/{checked_path(path)}", access=self.access)

    @property
    def _bucket(self) -> str:
        return split_s3_uri(self.uri)[0]

    @property
    def _prefix(self) -> str:
        return split_s3_uri(self.uri)[1]

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{checked_path(path)}".lstrip("/")

    def _get_quickly(self, path: str, span: str) -> bytes | None:
        """One attempt at a range without boto3, which takes 2 ms of interpreter time a request, a third of decoding a
        clip, mostly to sign it. A signature covers neither the range nor the moment, so it is used again for a while.
        None if anything is unusual: `_get` then does it with patience, and explains what is wrong."""
        url = f"{self.access.endpoint_url}/{quote(f'{self._bucket}/{self._key(path)}')}"
        if self.access.endpoint_url is None:
            return None
        headers = _signed_headers(self.access, url, int(time.time() / _SECONDS_PER_SIGNATURE)) | {"Range": span}
        try:
            answer = _session_of_process(self.access, os.getpid()).send(AWSRequest("GET", url, headers).prepare())
            return answer.content if answer.status_code == 206 else None
        except (BotoCoreError, OSError):
            return None

    def _get(self, path: str, **options: str) -> bytes:
        """The object's bytes. boto3 asks again a few times; a server that is down for longer, or that breaks off while
        its answer is read, is asked again here until its time is up."""

        def get() -> bytes:
            answer = _client(self.access).get_object(Bucket=self._bucket, Key=self._key(path), **options)
            return answer["Body"].read()

        with self.errors(path):
            return _patiently(get, _may_pass)

    @contextlib.contextmanager
    def _errors_of_write(self, path: str) -> Generator[None]:
        with self.errors(path):
            _require_bucket(self.access, self._bucket, os.getpid())
            yield

    @contextlib.contextmanager
    def errors(self, path: str) -> Generator[None]:
        """Turns what boto3 raises into one sentence that names the place and the remedy."""
        place = f"{self.uri}/{path}".rstrip("/")
        try:
            yield
        except ClientError as error:
            raise _explained(error, place, self._bucket, self.access) from error
        except (HTTPClientError, BotoConnectionError) as error:
            message = f"no S3 server answers at {self.access.place} (for {place}): check the address, and that it runs"
            raise StoreUnreachable(message) from error
        except (BotoCoreError, Boto3Error) as error:  # upload_file wraps the answer in an error of its own
            cause = error.__context__
            if isinstance(cause, ClientError):
                raise _explained(cause, place, self._bucket, self.access) from error
            raise StoreError(f"{place} at {self.access.place}: {error}") from error
        except OSError as error:
            raise StoreError(f"{place}: {error}") from error


def create_bucket_if_absent(s3: S3Access, bucket: str) -> None:
    with S3Store(uri=f"s3://{bucket}", access=s3).errors(""):
        names = [entry["Name"] for entry in _client(s3).list_buckets()["Buckets"]]
        if bucket not in names:
            _client(s3).create_bucket(Bucket=bucket)


def arrow_s3(access: S3Access) -> fs.S3FileSystem:
    """pyarrow's view of the server; paths in it start with the bucket."""
    endpoint = urlsplit(access.endpoint_url) if access.endpoint_url else None
    return fs.S3FileSystem(
        access_key=access.access_key or None,
        secret_key=access.secret_key or None,
        region=access.region,
        scheme=endpoint.scheme if endpoint else "https",
        endpoint_override=endpoint.netloc if endpoint else None,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=5),
        connect_timeout=5,
        request_timeout=60,
    )


def _client(access: S3Access) -> Any:
    return _client_of_process(access, os.getpid())


@functools.lru_cache(maxsize=16)
def _client_of_process(access: S3Access, process: int) -> Any:
    """One client for all threads of a process; a forked child must not share its parent's connections."""
    del process
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "max_attempts": 8},  # about 8 s: a server that restarts is waited for
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=_CONNECTIONS,
        # Servers other than Amazon's differ in the newer checksums; the index has a sha256 of every clip.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        proxies={} if _is_loopback(access) else None,
    )
    return Session().client(
        "s3",
        endpoint_url=access.endpoint_url,
        aws_access_key_id=access.access_key or None,
        aws_secret_access_key=access.secret_key or None,
        region_name=access.region,
        config=config,
    )


@functools.lru_cache(maxsize=64)
def _require_bucket(access: S3Access, bucket: str, process: int) -> None:
    """Some servers create a bucket that is merely written to: with them a mistyped name would swallow a data set."""
    _client_of_process(access, process).list_objects_v2(Bucket=bucket, MaxKeys=1)


def _patiently(request: Callable[[], Result], may_pass: Callable[[BotoCoreError | ClientError], bool]) -> Result:
    """What the request returns, which is repeated while its error may pass, until our patience is at its end."""
    began = time.monotonic()
    for attempt in itertools.count():
        try:
            return request()
        except (BotoCoreError, ClientError) as error:
            if not may_pass(error) or time.monotonic() - began > _PATIENCE_S:
                raise
            time.sleep(random.uniform(0.05, min(5.0, 0.1 * 2**attempt)))
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: BotoCoreError | ClientError) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or _code(error) in ("RequestTimeout", "SlowDown")
    return isinstance(error, (HTTPClientError, BotoConnectionError, IncompleteReadError))


@functools.lru_cache(maxsize=4096)
def _signed_headers(access: S3Access, url: str, period: int) -> dict[str, str]:
    """Headers that permit to get the object during this period; a server accepts them for a quarter of an hour."""
    del period
    request = AWSRequest("GET", url)
    S3SigV4Auth(Credentials(access.access_key, access.secret_key), "s3", access.region).add_auth(request)
    return dict(request.headers.items())


@functools.lru_cache(maxsize=16)
def _session_of_process(access: S3Access, process: int) -> URLLib3Session:
    del process
    url = access.endpoint_url or ""
    return URLLib3Session(
        proxies=None if _is_loopback(access) else get_environ_proxies(url),
        timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S),
        max_pool_connections=_CONNECTIONS,
    )


def _is_loopback(access: S3Access) -> bool:
    return urlsplit(access.endpoint_url or "").hostname in ("127.0.0.1", "localhost", "::1")


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
    if code in _AILING:  # after all retries; a server that starts again answers so for a while
        return StoreUnreachable(f"{access.place} cannot answer for {place} now ({code}: {message}): try again later")
    return StoreError(f"{access.place} answered {code} for {place}: {message}")
