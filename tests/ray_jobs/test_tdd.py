"""TDD on real clips: the same report as a training's, nothing done twice, and what was cut off goes on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.site import Site
from tests.fixtures_verbs import names_of_runs, runs_of, tavlad

pytestmark = pytest.mark.slow

COMMAND = [
    *("reproduce", "real", "--table", "2", "--rows", "tdd-vgg16", "--set", "model.trunk=efficientnet_lite0"),
    *("--set", "training.crop=64", "--set", "model.num_clusters=4", "--set", "tdd-vgg16:model.descriptor_pca=16"),
]


@pytest.mark.long
def test_row_of_table_2_is_reproduced_and_found_again(
    local_site: Site, packed_clips: dict[str, Any], tmp_path: Path
) -> None:
    before = names_of_runs(local_site)
    said = tavlad("--json", *COMMAND, "--to", str(tmp_path))
    rows = said.document["trainings"]
    assert [(row["split"], row["num_test_clips"], row["best_on_test"], row["model"]) for row in rows] == [
        (split, 9, None, "") for split in (1, 2, 3)
    ]
    assert sum(row["top1"] for row in rows) / 3 > 0.55, "chance is a third"
    assert all(row["run_url"].startswith(local_site.mlflow_uri) for row in rows)
    assert "tdd-vgg16" in "".join(said.document["departures"]) + said.out
    page = (tmp_path / "report.html").read_text()
    assert "training curves" not in page, "it has none"

    store = runs_of(local_site)
    (run,) = [name for name in names_of_runs(local_site) - before if "split1" in name]
    vectors = f"{run}/tdd/test0000000.npz"
    kept = np.load(io.BytesIO(store.read(vectors)))["vectors"]
    assert kept.shape == (9, 2 * 2 * 4 * 16), "two ways to normalise, two gradients, 4 Gaussians of 16 numbers"
    again = tavlad("--json", *COMMAND, "--to", str(tmp_path))
    assert again.document["trainings"] == rows
    assert again.err.count("done already") + again.out.count("done already") == 3

    for path in (f"{run}/outcome.json", vectors):  # as if it had been cut off there
        store.delete(path)
    resumed = tavlad("--json", *COMMAND, "--to", str(tmp_path)).document["trainings"]
    assert resumed[0]["top1"] == rows[0]["top1"]
    np.testing.assert_array_equal(np.load(io.BytesIO(store.read(vectors)))["vectors"], kept)
    assert json.loads((tmp_path / "report.json").read_text())["done"] == 3


def test_no_stage_trains_it(local_site: Site, packed_clips: dict[str, Any]) -> None:
    said = tavlad("train", "tdd-vgg16", "--dataset", "real")
    assert said.code == 2
    assert 'model.temporal = "tdd" is no network to train: run it by tavlad reproduce' in said.err
