"""Questions about a site that are asked on one of its hosts: `python -m tests.run_objects SITE QUESTION ...`.

The answer is the last line of stdout, a JSON document {"answer": ...}.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from infra.site import load_site
from ray_jobs.checkpoints import Checkpoints
from shards.store import Store, ensure_bucket, open_store

_PATIENCE_S = 880.0
_SITE = load_site(sys.argv[1])


def _runs() -> Store:
    return open_store(_SITE.runs_uri, _SITE.s3)


def _checkpoints(run: str) -> Checkpoints:
    return Checkpoints(_runs().child(f"{run}/checkpoints"))


def _get(url: str) -> bytes:
    request = urllib.request.Request(url)
    if url.startswith(_SITE.ray_dashboard):
        request.add_header("Authorization", f"Bearer {Path(os.environ['RAY_AUTH_TOKEN_PATH']).read_text()}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


def _listed(what: str) -> list[dict[str, Any]]:
    """Ray's own list of its nodes, actors or placement groups."""
    url = f"{_SITE.ray_dashboard}/api/v0/{what}?limit=10000"
    return json.loads(_get(url))["data"]["result"]["result"]


def make_bucket() -> str:
    """The site's bucket, as soon as the S3 server answers."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            ensure_bucket(_SITE.s3, _SITE.bucket)
            return _SITE.bucket
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def wait_for(url: str) -> str:
    """Until the server answers there."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return _get(url).decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def nodes() -> list[str]:
    """Addresses of Ray's living nodes."""
    try:
        return [row["node_ip"] for row in _listed("nodes") if row["state"] == "ALIVE"]
    except OSError:
        return []


def hosts_of_ranks() -> list[str]:
    """Addresses of the nodes on which ranks of trainings have been."""
    addresses = {row["node_id"]: row["node_ip"] for row in _listed("nodes")}
    ranks = [actor for actor in _listed("actors") if "TrainWorker" in actor["class_name"]]
    return sorted({addresses.get(actor["node_id"], actor["node_id"]) for actor in ranks})


def placement_groups() -> list[str]:
    """Those that hold something still."""
    return [each["placement_group_id"] for each in _listed("placement_groups") if each["state"] != "REMOVED"]


def epochs_in_mlflow(experiment: str, split: str) -> dict[str, list[int]]:
    """For each stage's run of the split's one training, the epochs whose loss was told, in order."""
    from mlflow import MlflowClient

    client = MlflowClient(_SITE.mlflow_uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None, f"MLflow knows no experiment {experiment}"
    every = client.search_runs([found.experiment_id], max_results=1000)
    ours = [run for run in every if run.data.tags.get("split") == split]
    (parent,) = [run for run in ours if run.data.tags["kind"] == "train"]
    epochs: dict[str, list[int]] = {}
    for run in ours:
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id:
            stage = run.data.tags["kind"]
            assert stage not in epochs, f"{stage} has two runs"
            points = client.get_metric_history(run.info.run_id, "train/loss")
            epochs[stage] = sorted(point.step for point in points)
    return epochs


def runs() -> list[str]:
    """Names of the trainings that have left anything."""
    return sorted({path.split("/")[0] for path in _runs().list()})


def checkpoints(run: str) -> list[str]:
    """A training's whole checkpoints."""
    return _checkpoints(run).names()


def wait_for_checkpoint(beyond: str) -> dict[str, Any]:
    """Until a training, the only one, has a whole checkpoint that comes after `beyond`; which, and when (unix time)."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        found = [(run, max(names)) for run in runs() if (names := checkpoints(run))]
        for run, newest in found:
            if newest > beyond:
                return {"run": run, "checkpoint": newest, "time": time.time()}
        assert time.monotonic() < deadline, f"no checkpoint after {beyond} came: {found}"
        time.sleep(0.1)


def weights(run: str) -> dict[str, str]:
    """A digest of each tensor of the training's last checkpoint."""
    newest = _checkpoints(run).names()[-1]
    with tempfile.TemporaryDirectory() as folder:
        _checkpoints(run).fetch(newest, Path(folder))
        tensors = load_file(Path(folder) / "weights.safetensors")
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in tensors.items()} | {"from": newest}


def forget() -> int:
    """All trainings' objects are deleted, so that the next one begins anew; how many there were."""
    paths = _runs().list()
    for path in paths:
        _runs().delete(path)
    return len(paths)


_QUESTIONS: dict[str, Any] = {
    "make-bucket": make_bucket,
    "wait-for": wait_for,
    "nodes": nodes,
    "hosts-of-ranks": hosts_of_ranks,
    "placement-groups": placement_groups,
    "epochs-in-mlflow": epochs_in_mlflow,
    "runs": runs,
    "checkpoints": checkpoints,
    "wait-for-checkpoint": wait_for_checkpoint,
    "weights": weights,
    "forget": forget,
}

if __name__ == "__main__":
    print(json.dumps({"answer": _QUESTIONS[sys.argv[2]](*sys.argv[3:])}))  # noqa: T201
