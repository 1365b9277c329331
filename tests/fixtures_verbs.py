"""Verbs as a user runs them, and what several modules run only once: a packed set, a training, a foreign site."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray._raylet import AuthenticationTokenLoader, Config
from safetensors.numpy import load

from infra.site import Site
from shards.store import Store, open_store

ACTIONS = ("bend", "jack", "wave2")
SHORT = [
    *("--set", "stage1.epochs=3", "--set", "stage2.epochs=1", "--set", "training.batch_size=8"),
    *("--set", "training.crop=64", "--set", "model.num_clusters=4", "--set", "model.gru_width=16"),
    *("--set", "stage1.features=never"),  # "auto" depends on what is stored when a training begins
]


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


def tavlad(*arguments: str, **environment: str) -> Said:
    command = [sys.executable, "-m", "ray_jobs.cli", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | environment, check=False
    )
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def real_videos(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three actions of Weizmann with their split files in HMDB51's format: folders `videos` and `splits`."""
    folder = tmp_path_factory.mktemp("weizmann")
    (folder / "splits").mkdir()
    for action in ACTIONS:
        shutil.copytree(shared_data / "weizmann" / "videos" / action, folder / "videos" / action)
        for path in (shared_data / "weizmann" / "splits_hmdb_format").glob(f"{action}_test_split*.txt"):
            shutil.copy(path, folder / "splits" / path.name)
    return folder


@pytest.fixture(scope="session")
def packed_clips(local_site: Site, real_videos: Path) -> dict[str, Any]:
    """These clips as a set on the embedded S3 server."""
    return tavlad(
        *("--json", "pack", str(real_videos / "videos"), "--name", "real", "--layout", "hmdb51"),
        *("--splits", str(real_videos / "splits"), "--num-frames", "8", "--short-side", "96"),
    ).document


def runs_of(site: Site) -> Store:
    return open_store(site.runs_uri, site.s3)


def final_weights(site: Site, run: str) -> dict[str, np.ndarray]:
    checkpoint = max(path for path in runs_of(site).list(f"{run}/checkpoints/") if path.endswith("weights.safetensors"))
    return load(runs_of(site).read(checkpoint))


def names_of_runs(site: Site) -> set[str]:
    return {path.split("/")[0] for path in runs_of(site).list()}


TRAIN = ["train", "demo", "--dataset", "real", *SHORT, "--set", "resources.workers=2"]


@dataclass(frozen=True)
class Trained:
    """A training by two workers, undisturbed and registered."""

    document: dict[str, Any]
    run: str
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def trained(local_site: Site, packed_clips: dict[str, Any]) -> Trained:
    before = names_of_runs(local_site)
    document = tavlad("--json", *TRAIN).document
    (run,) = names_of_runs(local_site) - before
    return Trained(document, run, final_weights(local_site, run))


@pytest.fixture(scope="session")
def lab(local_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """The embedded services as a foreign site, whose keys are in a private file."""
    folder = tmp_path_factory.mktemp("lab")
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{local_site.s3.access_key}\n{local_site.s3.secret_key}\n")
    file = folder / "lab.toml"
    file.write_text(
        f'ray_address = "{local_site.ray_address}"\nray_dashboard = "{local_site.ray_dashboard}"\n'
        f's3_endpoint = "{local_site.s3.endpoint_url}"\nbucket = "{local_site.bucket}"\n'
        f'mlflow = "{local_site.mlflow_uri}"\ns3_keys = "{keys}"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_site.ray_environment().items():
            patch.setenv(name, value)
        # A process reads these once, and a test before may have had it do so.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield file
