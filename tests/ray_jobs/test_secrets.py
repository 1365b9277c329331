"""Keys are nowhere in what a training leaves behind: files, logs, Ray's session, MLflow, the bucket, argv."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local_ray import session_folder
from infra.site import Site
from shards.store import open_store
from tests.fixtures_verbs import Trained

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


def test_training_leaves_no_key_behind(
    local_site: Site,
    packed_clips: dict[str, Any],
    trained: Trained,
) -> None:
    assert local_site.state is not None
    hidden = secrets(local_site)
    looked, found = 0, []
    for folder in (local_site.state, session_folder(local_site.state)):
        for path in files(folder):
            if path.name in _KEEPERS:
                assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
                continue
            if path.stat().st_size <= _MAX_BYTES:
                content = path.read_bytes()
                looked += 1
                found += [f"{name} in {path}" for name, secret in hidden.items() if secret in content]
    assert looked > 20, "too few files to prove anything"
    assert found == []

    store = open_store(f"s3://{local_site.bucket}", local_site.s3)
    written = [path for path in store.list() if path.startswith(("runs/", "mlflow/", "codebooks/"))]
    assert len(written) > 10
    for path in written:
        content = store.read(path)
        assert not [name for name, secret in hidden.items() if secret in content], path


def test_no_process_shows_a_key_in_its_arguments(local_site: Site, trained: Trained) -> None:
    hidden = [secret.decode() for secret in secrets(local_site).values()]
    for process in psutil.process_iter(["cmdline", "uids"]):
        if process.info["uids"] and process.info["uids"].real == os.getuid():
            assert not [secret for secret in hidden if secret in " ".join(process.info["cmdline"] or [])]
