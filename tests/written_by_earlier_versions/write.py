"""Write what a commit's code leaves behind: `python -m tests.written_by_earlier_versions.write FILE.tar.xz`.

The verbs of the commit that is checked out pack videos, train on them and register the models, on embedded services of
their own. What then lies in the bucket and in the registry goes into one archive.
"""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from infra import local
from infra.site import Site, load_site
from ray_jobs.checkpoints import Checkpoints
from shards.store import open_store
from tavlad.backbone import build_trunk
from tests.fixtures_services import temporary_home
from tests.fixtures_sets import make_folders

_HERE = Path(__file__).parent
_PERIOD = 251
_MIDDLE = "stage1-epoch00001-step000001"


def main(archive: Path) -> None:
    """Everything, from the videos to the archive."""
    with tempfile.TemporaryDirectory() as folder, temporary_home():
        local.up()
        site = load_site()
        for name in ("resnet18", "efficientnet_lite0"):
            open_store("s3://tavlad/weights", site.s3).write(f"{name}.safetensors", _weights(name))
        videos = str(make_folders(Path(folder) / "videos", 5))
        packing = ["--name", "numbers", "--num-frames", "4", "--short-side", "32", "--shard-megabytes", "0.03"]
        _run("pack", videos, *packing)
        _run("pack", videos, "--name", "numbers-video", "--format", "video", "--num-frames", "4", "--short-side", "32")
        clusters, features = (str(_HERE / "recipes" / name) for name in ("clusters.toml", "features.toml"))
        _run("features", features)
        _run("features", clusters)
        _run("features", clusters, "--stage", "2", "--set", "stage2.fc=true")
        _run("train", features)
        _run("train", clusters)
        whole = Path(folder) / "whole"
        _copy_bucket(site, whole / "bucket")
        _copy_registry(site, whole / "registry")
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for path in sorted(whole.rglob("*")):
                if path.is_file():
                    tar.add(path, str(path.relative_to(whole)), filter=_anonymous)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", *arguments], check=True, env=os.environ)


def _weights(name: str) -> bytes:
    """Weights that repeat every 251 values: they compress to nothing, and yet no two channels are the same."""
    trunk = build_trunk(name)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in trunk.state_dict().items():
        wave = ((torch.arange(tensor.numel()) * 97 % _PERIOD) / (_PERIOD - 1) * 2 - 1).float().reshape(tensor.shape)
        if tensor.ndim > 1:
            tensors[key] = wave * (6 / tensor[0].numel()) ** 0.5
        elif key.endswith("running_var") or (key.endswith("weight") and tensor.ndim == 1):
            tensors[key] = 1 + wave / 10
        elif tensor.ndim == 1:
            tensors[key] = wave / 10
    return safetensors.torch.save(tensors)


def _copy_bucket(site: Site, folder: Path) -> None:
    """Of each training one checkpoint in mid-epoch and the last; nothing of Ray Train's own."""
    bucket = open_store("s3://tavlad", site.s3)
    paths = [path for prefix in ("datasets", "weights", "features", "codebooks") for path in bucket.list(f"{prefix}/")]
    for run in {path.split("/")[1] for path in bucket.list("runs/")}:
        place = f"runs/{run}/checkpoints"
        names = Checkpoints(bucket.child(place)).names()
        for name in {_MIDDLE, names[-1]} & set(names):
            paths += bucket.list(f"{place}/{name}/")
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        bucket.download(path, folder / path)


def _copy_registry(site: Site, folder: Path) -> None:
    """Each version's files and what the registry says of it."""
    client = MlflowClient(site.mlflow_uri)
    for model in client.search_registered_models():
        for version in client.search_model_versions(f"name = '{model.name}'"):
            place = folder / model.name / str(version.version)
            (place / "model").mkdir(parents=True)
            at = client.get_model_version_download_uri(version.name, version.version)
            repository = get_artifact_repository(at, tracking_uri=site.mlflow_uri)
            repository.download_artifacts("", str(place / "model"))
            aliases = client.get_registered_model(model.name).aliases
            facts = {"run_id": version.run_id, "source": version.source, "tags": version.tags, "aliases": aliases}
            (place / "version.json").write_text(json.dumps(facts, indent=1, sort_keys=True, default=str) + "\n")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]))
