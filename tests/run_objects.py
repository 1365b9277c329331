"""Questions about a site that are asked on one of its hosts: `python -m tests.run_objects SITE QUESTION ...`.

The answer is the last line of stdout, a JSON document {"answer": ...}.
"""

import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from infra.site import load_site
from shards.store import Store, ensure_bucket, open_store

_PATIENCE_S = 230.0
_SITE = load_site(sys.argv[1])


def _runs() -> Store:
    return open_store(_SITE.runs_uri, _SITE.s3)


def _get(url: str) -> bytes:
    request = urllib.request.Request(url)
    if url.startswith(_SITE.ray_dashboard):
        request.add_header("Authorization", f"Bearer {Path(os.environ['RAY_AUTH_TOKEN_PATH']).read_text()}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


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
        rows = json.loads(_get(f"{_SITE.ray_dashboard}/api/v0/nodes"))["data"]["result"]["result"]
    except OSError:
        return []
    return [row["node_ip"] for row in rows if row["state"] == "ALIVE"]


def hosts_of_ranks() -> list[str]:
    """Addresses of the nodes on which ranks of trainings have been."""
    url = f"{_SITE.ray_dashboard}/api/v0/actors?limit=10000&detail=1"
    actors = json.loads(_get(url))["data"]["result"]["result"]
    nodes = json.loads(_get(f"{_SITE.ray_dashboard}/api/v0/nodes"))["data"]["result"]["result"]
    addresses = {row["node_id"]: row["node_ip"] for row in nodes}
    ranks = [actor for actor in actors if "TrainWorker" in actor["class_name"]]
    return sorted({addresses.get(actor["node_id"], actor["node_id"]) for actor in ranks})


def runs() -> list[str]:
    """Names of the trainings that have left anything."""
    return sorted({path.split("/")[0] for path in _runs().list()})


def checkpoints(run: str) -> list[str]:
    """A training's whole checkpoints."""
    head, tail = f"{run}/checkpoints/", "/complete.json"
    return [path.removeprefix(head).removesuffix(tail) for path in _runs().list(head) if path.endswith(tail)]


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
    store = _runs()
    newest = max(path for path in store.list(f"{run}/checkpoints/") if path.endswith("weights.safetensors"))
    tensors = load(store.read(newest))
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
    "runs": runs,
    "checkpoints": checkpoints,
    "wait-for-checkpoint": wait_for_checkpoint,
    "weights": weights,
    "forget": forget,
}

if __name__ == "__main__":
    print(json.dumps({"answer": _QUESTIONS[sys.argv[2]](*sys.argv[3:])}))  # noqa: T201
