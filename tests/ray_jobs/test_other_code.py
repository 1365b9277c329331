"""Trainings of edited code, by the real parts: refused where cut off, labelled where done, never mixed unasked."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from infra.site import Site
from ray_jobs.provenance import PACKAGES, ROOT, digest_of_sources
from tests.fixtures_verbs import SHORT, Said, final_weights, names_of_runs, runs_of, tavlad

pytestmark = pytest.mark.long

COMMAND = ["train", "demo", "--dataset", "real", *SHORT, "--set", "training.seed=6"]
FIRST = "checkpoints/stage1-epoch00001/complete.json"


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our packages with one comment more."""
    folder = tmp_path_factory.mktemp("edited")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "tavlad" / "vlad.py").open("a") as file:
        file.write("# An edit.\n")
    return folder


def _start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The verb, done by the code of a folder."""
    command = [sys.executable, "-m", "ray_jobs.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def _by(folder: Path, *arguments: str) -> Said:
    process = _start(folder, *arguments)
    out, err = process.communicate(timeout=400)
    return Said(process.returncode, out, err)


def _cut_off(site: Site, folder: Path) -> str:
    """A training that the folder's code began, killed after its first epoch; its name."""
    before = names_of_runs(site)
    driver = _start(folder, *COMMAND, "--no-register")
    deadline = time.monotonic() + 240
    while True:
        for run in names_of_runs(site) - before:
            if f"{run}/{FIRST}" in runs_of(site).list(f"{run}/"):
                driver.kill()
                driver.communicate()
                return run
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)


def _tags(site: Site, version: int) -> dict[str, str]:
    return dict(MlflowClient(site.mlflow_uri).get_model_version("tavlad-real-split1", str(version)).tags)


def test_training_of_edited_code_is_refused_continued_on_request_labelled_and_begun_anew(
    local_site: Site, packed_clips: dict[str, Any], edited: Path
) -> None:
    theirs, ours = digest_of_sources(edited), digest_of_sources()
    assert theirs != ours
    run = _cut_off(local_site, edited)

    refused = tavlad(*COMMAND)
    assert refused.code == 2, refused.out + refused.err
    (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert f"{run} was cut off" in line
    assert theirs[:10] in line
    assert "--resume-with-new-code" in line
    assert "--fresh" in line

    mixed = tavlad("--json", *COMMAND, "--resume-with-new-code")
    assert "going on from checkpoint stage" in mixed.err
    version = mixed.document["version"]
    tags = _tags(local_site, version)
    assert (tags["training"], tags["sources_sha256"]) == (run, ours)
    assert theirs[:10] in tags["earlier_code"]

    found = _by(edited, "--json", *COMMAND)
    assert found.document["version"] == version, "done, it is used again, whichever code asks"
    assert f"made by other code, which --fresh leaves aside: commit unknown, sources {theirs[:10]}, then " in found.err
    assert _tags(local_site, version)["sources_sha256"] == ours, "the version says who trained it, not who registers it"

    weights = final_weights(local_site, run)
    anew = tavlad("--json", *COMMAND, "--fresh")
    assert anew.document["version"] != version
    tags = _tags(local_site, anew.document["version"])
    assert (tags["training"], tags["sources_sha256"], "earlier_code" in tags) == (f"{run}.2", ours, False)
    assert tavlad("--json", *COMMAND).document == anew.document
    assert final_weights(local_site, run).keys() == weights.keys(), "what was done stays"
    runs = MlflowClient(local_site.mlflow_uri).search_runs(
        [MlflowClient(local_site.mlflow_uri).get_experiment_by_name("tavlad/real").experiment_id]
    )
    named = {each.data.tags["tavlad.run"]: each.data.tags["sources_sha256"] for each in runs}
    assert (named[run], named[f"{run}.2"]) == (ours, ours)


def test_worker_that_reads_code_edited_since_the_start_is_refused(
    local_site: Site, packed_clips: dict[str, Any], edited: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "code"
    shutil.copytree(edited, folder)
    training = _start(folder, *COMMAND, "--set", "stage1.lr=0.02", "--no-register")
    assert training.stdout is not None
    for line in training.stdout:
        if line.startswith("Training "):
            break
    with (folder / "tavlad" / "vlad.py").open("a") as file:
        file.write("# Another edit, before any worker reads it.\n")
    out, err = training.communicate(timeout=300)
    assert training.returncode == 2, out + err
    assert "a worker has other code than the driver" in err
