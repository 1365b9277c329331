"""Does a site's S3 server and MLflow do what a run needs? Tried from this machine, and by a job from the cluster."""

import email.utils
import http.client
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from infra.site import Site
from shards.store import AccessRefused, MissingObject, Store, StoreError, StoreUnreachable, open_store

MAX_SKEW_S = 60.0
"""Clocks may differ by so much; S3 refuses requests at 15 minutes, and times in MLflow would mislead long before."""
_TIMEOUT_S = 10.0
_PROBE = b"tavlad site check"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    what: str
    fine: bool
    found: str
    remedy: str = ""
    """What to do, if it is not fine."""


def check_s3(site: Site) -> list[Finding]:
    """Reads, writes, lists and conditionally creates one small object, which is removed again."""
    store = open_store(f"s3://{site.bucket}/site-check", site.s3)
    path = uuid.uuid4().hex
    steps: list[tuple[str, Callable[[Store, str], str | None]]] = [
        ("S3 bucket", _bucket),
        ("S3 write", _write),
        ("S3 read", _read),
        ("S3 conditional put", _conditional_put),
    ]
    findings: list[Finding] = []
    for what, step in steps:
        finding = _tried(what, step, store, path, site)
        findings.append(finding)
        if not finding.fine:
            break  # the others would only say the same
    if len(findings) > 1:
        _tried("S3 delete", _delete, store, path, site)
    return findings


def check_mlflow(site: Site, our_version: str) -> list[Finding]:
    """MLflow answers, is MLflow, and is of the minor version that this code was written for."""
    address = site.mlflow_uri
    try:
        status, version, _ = _get(f"{address}/version")
    except (OSError, http.client.HTTPException) as error:
        remedy = f"start MLflow, or correct mlflow of site {site.name} (TAVLAD_MLFLOW), and the network between"
        return [Finding(what="MLflow", fine=False, found=f"nothing answers at {address} ({error})", remedy=remedy)]
    if status != http.HTTPStatus.OK or not version.replace(".", "").isalnum():
        remedy = f"give MLflow's own address as mlflow of site {site.name}, without a path, or mend its proxy"
        return [Finding(what="MLflow", fine=False, found=f"{address}/version answers HTTP {status}", remedy=remedy)]
    is_same = version.split(".")[:2] == our_version.split(".")[:2]
    return [
        Finding(
            what="MLflow",
            fine=is_same,
            found=f"version {version} at {address}",
            remedy="" if is_same else f"run MLflow {our_version} there, or install {version} here and in the image",
        )
    ]


def check_clocks(site: Site, now: Callable[[], float] = time.time) -> list[Finding]:
    """This machine's clock against those of the servers that say the time."""
    findings: list[Finding] = []
    for name, address in (("S3", site.s3.endpoint_url or "https://s3.amazonaws.com"), ("MLflow", site.mlflow_uri)):
        try:
            _, _, date = _get(address)
        except (OSError, http.client.HTTPException):
            continue  # said by another check
        if not date:
            continue
        skew = now() - email.utils.parsedate_to_datetime(date).timestamp()
        findings.append(
            Finding(
                what=f"clock of {name}",
                fine=abs(skew) <= MAX_SKEW_S,
                found=f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} this one",
                remedy="" if abs(skew) <= MAX_SKEW_S else "let NTP set the clocks of both machines",
            )
        )
    return findings


def _tried(what: str, step: Callable[[Store, str], str | None], store: Store, path: str, site: Site) -> Finding:
    place = f"{site.s3.place}, bucket {site.bucket}"
    try:
        problem = step(store, path)
    except StoreUnreachable as error:
        return Finding(
            what=what, fine=False, found=str(error), remedy=f"start it, or correct s3_endpoint of site {site.name}"
        )
    except AccessRefused as error:
        remedy = f"give the right keys (s3_keys of site {site.name} is {site.s3_keys!r}), with rights to this bucket"
        return Finding(what=what, fine=False, found=str(error), remedy=remedy)
    except MissingObject as error:
        remedy = f"create bucket {site.bucket}, or correct bucket of site {site.name} (TAVLAD_BUCKET)"
        return Finding(what=what, fine=False, found=str(error), remedy=remedy)
    except StoreError as error:
        return Finding(what=what, fine=False, found=str(error), remedy="look at the S3 server's own log")
    if problem is not None:
        return Finding(what=what, fine=False, found=problem, remedy="use an S3 server that keeps what S3 promises")
    return Finding(what=what, fine=True, found=place)


def _bucket(store: Store, path: str) -> str | None:
    return "an object that nobody wrote exists" if store.exists(path) else None


def _write(store: Store, path: str) -> str | None:
    store.write(path, _PROBE)
    return None if store.list() else "what was written is not listed"


def _read(store: Store, path: str) -> str | None:
    whole, part = store.read(path), store.read_range(path, 7, 4)
    return None if (whole, part) == (_PROBE, b"site") else "what is read is not what was written"


def _conditional_put(store: Store, path: str) -> str | None:
    if store.write_if_absent(path, b"other"):
        return "an object was overwritten by a put with If-None-Match: two runs could both win"
    return None


def _delete(store: Store, path: str) -> str | None:
    store.delete(path)
    return None


def _get(address: str) -> tuple[int, str, str]:
    """HTTP status, the first characters of the answer, and its Date."""
    host = urlsplit(address).hostname
    handlers = [urllib.request.ProxyHandler({})] if host in ("127.0.0.1", "localhost", "::1") else []
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(address, timeout=_TIMEOUT_S) as answer:
            return answer.status, answer.read(100).decode(errors="replace").strip(), answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", error.headers.get("Date", "")
