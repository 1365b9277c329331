"""`tavlad features` killed with -9 while it fills, driver and actors: the same bytes as filled in a single go."""

import random
import subprocess
import sys
import time
from typing import Any

import pytest

from infra.site import Site
from shards.store import Store, open_store
from tests.fixtures_verbs import tavlad
from tests.ray_jobs.test_tune_chaos import actors_of, until

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

_FEATURES = [
    *("features", "demo", "--dataset", "real", "--views", "6"),
    *("--set", "model.trunk=resnet18", "--set", "model.weights=none", "--set", "training.crop=64"),
]


def _content(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


def _num_shards(store: Store) -> int:
    return len([path for path in store.list() if path.startswith("parts/")])


def test_filling_killed_twice_ends_as_filled_in_a_single_go(local_site: Site, packed_clips: dict[str, Any]) -> None:
    store = open_store(tavlad("--json", *_FEATURES).document["uri"], local_site.s3)
    whole, num_shards = _content(store), _num_shards(store)
    assert num_shards >= 12
    for path in whole:
        store.delete(path)

    seed = time.time_ns()
    moments = random.Random(seed)
    for _ in range(2):
        before = _num_shards(store)
        with subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *_FEATURES], stderr=subprocess.DEVNULL) as driver:
            try:
                until(lambda: actors_of(local_site, "_Filler"))[0].kill()
                until(lambda before=before: _num_shards(store) > before)
                time.sleep(moments.uniform(0, 1))
            finally:
                driver.kill()
        assert not [path for path in store.list() if path.startswith("split1-")], (
            f"seed {seed}: killed too late to prove anything"
        )
    until(lambda: not actors_of(local_site, "_Filler"))
    cut = _content(store)
    assert tavlad("--json", *_FEATURES).code == 0
    assert _content(store) == whole, f"seed {seed}"
    assert {path: whole[path] for path in cut} == cut, f"seed {seed}: what was there stays"
