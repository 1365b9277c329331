"""A registered model in a new virtual environment with MLflow and the model's own requirements, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from infra.site import Site
from shards.index import load_index
from shards.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

_TRAIN = [
    *("train", "demo", "--dataset", "fresh", "--set", "stage1.epochs=4", "--set", "stage2.epochs=1"),
    *("--set", "training.batch_size=8", "--set", "training.precision='bf16'"),
]
_PREDICT = """
import json, sys
from importlib.metadata import distributions
import mlflow
installed = {each.metadata["Name"].lower() for each in distributions()}
assert not installed & {"ray", "webdataset", "tavlad", "boto3"}, installed
model = mlflow.pyfunc.load_model("models:/tavlad-fresh-split1@best")
table = model.predict(json.loads(sys.argv[1]), params={"top": 99})
print(json.dumps(table.to_dict("records")))
"""


def tavlad(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fresh_environment_predicts_real_clips_as_evaluation_did(
    local_site: Site, shared_data: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for action in ("bend", "jack", "wave2"):
        (videos / action).symlink_to(shared_data / "weizmann" / "videos" / action)
    tavlad("pack", str(videos), "--name", "fresh", "--num-frames", "12", "--short-side", "128")
    tavlad(*_TRAIN)

    client = MlflowClient(local_site.mlflow_uri)
    version = client.get_model_version_by_alias("tavlad-fresh-split1", "best")
    at = client.get_model_version_download_uri(version.name, version.version)
    files = Path(get_artifact_repository(at, tracking_uri=local_site.mlflow_uri).download_artifacts(""))
    suffixes = {path.suffix for path in files.rglob("*") if path.is_file()}
    assert suffixes == {"", ".json", ".safetensors", ".py", ".yaml", ".txt"}, "no pickle is among its files"

    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--python", str(python)]
    subprocess.run([*uv, "mlflow==3.17.2", "-r", str(files / "requirements.txt")], check=True)

    table = pq.read_table(client.download_artifacts(version.run_id, "predictions.parquet", str(tmp_path)))
    index = load_index(open_store(local_site.dataset_uri("fresh"), local_site.s3))
    clips = index.clips_table.table
    source_of = dict(zip(clips["key"].to_pylist(), clips["source"].to_pylist(), strict=True))
    paths = [str(videos / source_of[key]) for key in table["key"].to_pylist()]
    assert len(paths) >= 5
    done = subprocess.run(
        [str(python), "-I", "-W", "ignore", "-c", _PREDICT, json.dumps(paths)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": local_site.mlflow_uri},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, float]] = {}
    for row in json.loads(done.stdout.splitlines()[-1]):
        said.setdefault(row["video"], {})[row["action"]] = row["probability"]
    differences = [
        abs(said[path][action] - score)
        for path, scores in zip(paths, table["scores"].to_pylist(), strict=True)
        for action, score in zip(index.actions, scores, strict=True)
    ]
    print(f"largest difference of {len(differences)} probabilities: {max(differences):.2e}", file=sys.stderr)  # noqa: T201
    assert max(differences) < 1e-5
    assert np.std(table["scores"].to_pylist(), axis=0).max() > 1e-3, "a model that says the same of all proves nothing"
