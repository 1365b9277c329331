"""Keys are nowhere in what a training, or a whole demo, leaves behind: files, logs, Ray's session and its runtime
environments, MLflow, the bucket, argv."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local_ray import session_folder
from infra.site import Site
from shards.store import open_store
from tests.fixtures_verbs import Trained, tavlad

pytestmark = pytest.mark.slow

_MAX_BYTES = 64_000_000
_KEEPERS = {"site.json", "s3_keys.json", "ray_token"}
"""The files whose purpose is a key; they are their owner's alone."""


def files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        # The S3 server's own volumes are looked at through the server, below.
        if path.is_file() and not path.is_symlink() and "s3" not in path.relative_to(folder).parts[:1]:
            yield path


def secrets(site: Site) -> dict[str, bytes]:
    assert site.state is not None
    return {
        "the S3 secret key": site.s3.secret_key.encode(),
        "Ray's token": (site.state / "ray_token").read_bytes().strip(),
    }


def shown(site: Site) -> tuple[list[str], int]:
    """Where a key can be read that should not, and how many places were looked at."""
    assert site.state is not None
    hidden = secrets(site)
    looked, found = 0, []
    for folder in (site.state, session_folder(site.state)):
        for path in files(folder):
            if path.name in _KEEPERS:
                assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
                continue
            if path.stat().st_size <= _MAX_BYTES:
                content = path.read_bytes()
                looked += 1
                found += [f"{name} in {path}" for name, secret in hidden.items() if secret in content]
    store = open_store(f"s3://{site.bucket}", site.s3)
    for path in store.list():
        if path.startswith(("runs/", "mlflow/", "codebooks/", "sweeps/")):
            content = store.read(path)
            looked += 1
            found += [f"{name} in s3://{site.bucket}/{path}" for name, secret in hidden.items() if secret in content]
    return found, looked


def test_training_leaves_no_key_behind(local_site: Site, packed_clips: dict[str, Any], trained: Trained) -> None:
    found, looked = shown(local_site)
    assert looked > 30, "too few files to prove anything"
    assert found == []


@pytest.mark.long
def test_demo_leaves_no_key_behind(local_site: Site, real_videos: Path) -> None:
    said = tavlad("--json", "demo", "--videos", str(real_videos / "videos"), "--name", "secrets")
    assert said.document["models"]
    found, looked = shown(local_site)
    assert looked > 60, "too few files to prove anything"
    assert found == []
    assert not [name for name, secret in secrets(local_site).items() if secret.decode() in said.out + said.err]
    dumped = subprocess.run([sys.executable, "-c", _DUMP], capture_output=True, text=True, check=True).stdout
    assert "TAVLAD_HOME" in dumped, "the runtime environments were not dumped"
    assert not [name for name, secret in secrets(local_site).items() if secret.decode() in dumped]


_DUMP = """
from infra.site import activate, load_site
site = load_site()
activate(site)
from ray.util import state
from ray_jobs.cluster import connect
connect(site)
print(state.list_runtime_envs(limit=1000), state.list_jobs(limit=1000), state.list_actors(limit=1000, detail=True))
print(state.list_workers(limit=1000, detail=True))
"""


def test_no_process_shows_a_key_in_its_arguments(local_site: Site, trained: Trained) -> None:
    hidden = [secret.decode() for secret in secrets(local_site).values()]
    for process in psutil.process_iter(["cmdline", "uids"]):
        if process.info["uids"] and process.info["uids"].real == os.getuid():
            assert not [secret for secret in hidden if secret in " ".join(process.info["cmdline"] or [])]
