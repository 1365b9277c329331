"""What earlier commits left in a bucket and in the registry: today's code finds it under its names and reads it.

Each archive of tests/written_by_earlier_versions holds what one commit wrote; its README says how.
"""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.site import Site
from ray_jobs.codebook import build_untrained, codebook_of, load_codebook
from ray_jobs.features import Extractor, feature_loader, feature_set
from ray_jobs.plan import TrainingPlan, open_set, plan_training
from ray_jobs.recipe import Recipe, load_recipe
from ray_jobs.served_model import ServedModel
from ray_jobs.worker import HISTORY, load_scores
from shards.features import CENTRE_SLOT, FeatureTable
from shards.index import load_index
from shards.read import ClipLoader, LoaderOptions
from shards.store import S3Access, open_store
from shards.transforms import views_of
from shards.verify import verify
from tavlad.checkpoint import WEIGHTS, load_model, load_state, load_weights_into
from tavlad.clip import FeatureKind
from tavlad.model import TaVlad
from tavlad.registry_queries import DIGEST_TAG, digest_of
from tavlad.train import EpochReport, Listeners, StagePlan, fit

WRITTEN = Path(__file__).parent / "written_by_earlier_versions"
RECIPES = ("clusters", "features")


@pytest.fixture(scope="module", params=sorted(WRITTEN.glob("*.tar.xz")), ids=lambda path: path.name.split(".")[0])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a commit wrote: folders `bucket` and `registry`."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def site(written: Path, local_s3: S3Access) -> Site:
    """A site whose bucket is the commit's."""
    bucket = open_store("s3://tavlad", local_s3)
    for path in sorted((written / "bucket").rglob("*")):
        if path.is_file():
            bucket.upload(path, path.relative_to(written / "bucket").as_posix())
    nowhere = "http://127.0.0.1:9"
    return Site(
        name="earlier",
        ray_address="127.0.0.1:9",
        ray_dashboard=nowhere,
        s3=local_s3,
        bucket="tavlad",
        mlflow_uri=nowhere,
    )


def recipe_named(name: str) -> Recipe:
    return load_recipe(str(WRITTEN / "recipes" / f"{name}.toml"))


def loader(site: Site, recipe: Recipe, part: Literal["train", "test"]) -> ClipLoader:
    """As each rank of a training reads clips."""
    store, index = open_set(site, recipe.dataset, recipe)
    settings = recipe.training
    options = LoaderOptions(
        batch_size=settings.batch_size,
        seed=settings.seed,
        crop=settings.crop,
        augment=part == "train" and settings.augment,
        views=settings.views,
        num_views=settings.num_views,
        shuffle=part == "train",
    )
    return ClipLoader(index, store, 1, part, options)


@pytest.mark.parametrize("name", ["numbers", "numbers-video"])
def test_set_is_whole_and_yields_every_clip(written: Path, name: str) -> None:
    store = open_store(str(written / "bucket" / "datasets" / name))
    assert verify(store) == []
    index = load_index(store)
    options = LoaderOptions(batch_size=4, seed=0, crop=32, augment=True, shuffle=True)
    batches = list(ClipLoader(index, store, 1, "train", options).epoch(0))
    assert sorted(key for batch in batches for key in batch.keys) == sorted(
        index.clips(1, "train").table["key"].to_pylist()
    )
    assert all(batch.frames_BTCHW.shape[1:] == (4, 3, 32, 32) for batch in batches)
    assert min(int(batch.frames_BTCHW.float().std()) for batch in batches) > 50, "black and white bars are in all"


@pytest.mark.parametrize(("name", "kind"), [("features", "last"), ("clusters", "last"), ("clusters", "early")])
def test_features_are_found_and_are_what_the_trunk_computes(site: Site, name: str, kind: FeatureKind) -> None:
    recipe = recipe_named(name)
    store, index = open_set(site, recipe.dataset, recipe)
    model, provenance = build_untrained(site, recipe, len(index.actions))
    features = feature_set(site, recipe, index, model, provenance, kind)
    rows = features.filled(1, 2)
    assert rows is not None, f"nothing is filled at {features.store.uri}"
    table, extract = FeatureTable(index.clips_table, rows), Extractor(model, torch.device("cpu"), "float32", kind)
    reader = feature_loader(recipe, index, store, 1)
    found = np.argwhere(table.present >= 0)
    assert len(found) == 24
    for row, slot in found.tolist():
        place = table.place(row, slot)
        assert place is not None
        view = None if slot == CENTRE_SLOT else views_of(reader.clips.key(row))[slot]
        computed = extract(reader.read_view(row, view)[None]).maps_BTDHW[0]
        stored = torch.from_numpy(features.read(place).map_TDHW.astype(np.float32))
        torch.testing.assert_close(stored, computed, rtol=2e-3, atol=2e-3 * float(computed.abs().max()))


@pytest.mark.parametrize("name", RECIPES)
def test_finished_training_is_found_by_its_recipe(site: Site, written: Path, name: str) -> None:
    plan, _ = plan_training(site, recipe_named(name), 1)
    assert (written / "bucket" / "runs" / plan.name).is_dir()
    assert plan.last_checkpoint in plan.checkpoints(site).names()
    registered = [version["tags"]["training"] for version, _ in versions(written)]
    assert registered.count(plan.name) == 1


def test_codebook_is_found_by_its_recipe(site: Site) -> None:
    recipe = recipe_named("clusters")
    store, index = open_set(site, recipe.dataset, recipe)
    model, provenance = build_untrained(site, recipe, len(index.actions))
    codebook = codebook_of(site, recipe, 1, index, store, model, provenance)
    assert codebook.was_there
    assert load_codebook(codebook.uri, site).centres_KD.shape == (3, 512)


def test_training_cut_off_in_mid_epoch_ends_as_it_did_undisturbed(site: Site, tmp_path: Path) -> None:
    recipe = recipe_named("clusters")
    plan, index = plan_training(site, recipe, 1)
    middle, *_, last = plan.checkpoints(site).names()
    assert (middle, last) == ("stage1-epoch00001-step000001", plan.last_checkpoint)
    for name in (middle, last):
        plan.checkpoints(site).fetch(name, tmp_path / name)

    model, _ = build_untrained(site, recipe, len(index.actions))
    load_weights_into(model, tmp_path / middle)
    steps, reports = go_on(site, plan, model, tmp_path / middle)

    assert steps == [5, 6, 1, 2, 3], "one step of the second epoch was done"
    expected = load_file(tmp_path / last / WEIGHTS)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    history = json.loads((tmp_path / last / HISTORY).read_text())[-2:]
    assert [report.metrics["train/loss"] for report in reports] == pytest.approx([row["train/loss"] for row in history])
    assert [report.metrics["test/top1"] for report in reports] == [row["test/top1"] for row in history]


def go_on(site: Site, plan: TrainingPlan, model: TaVlad, checkpoint: Path) -> tuple[list[int], list[EpochReport]]:
    """Both stages from a checkpoint on, as a rank trains them: the steps done, and what was reported."""
    resume = load_state(checkpoint)
    steps, reports = list[int](), list[EpochReport]()
    listeners = Listeners(on_epoch=reports.append, on_step=lambda done, total: steps.append(done))
    train, test = (loader(site, plan.recipe, part) for part in ("train", "test"))
    for number, stage in plan.stages:
        stage_plan = StagePlan(number=number, stage=stage, training=plan.recipe.training)
        fit(model, stage_plan, train, test, listeners, resume if number == resume.stage else None)
    return steps, reports


def versions(written: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """What the registry said of each version, and its model folder."""
    for path in sorted((written / "registry").rglob("version.json")):
        yield json.loads(path.read_text()), path.parent / "model"


_PREDICT = """
import json, sys
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
table = model.predict(numpy.load(sys.argv[2]), params={"top": 3})
import tavlad.predict
print(json.dumps({"code": tavlad.predict.__file__, "rows": table.to_dict("records")}))
"""


@pytest.mark.parametrize("name", RECIPES)
def test_registered_model_predicts_as_it_was_evaluated(site: Site, written: Path, tmp_path: Path, name: str) -> None:
    """By MLflow, with the code that travels with it; and by today's code."""
    plan, index = plan_training(site, recipe_named(name), 1)
    (version,) = [each for each in versions(written) if each[0]["tags"]["training"] == plan.name]
    facts, folder = version
    directory = folder / "data" / "checkpoint"
    assert digest_of(directory) == facts["tags"][DIGEST_TAG]
    plan.checkpoints(site).fetch(plan.last_checkpoint, tmp_path / "checkpoint")
    scores = load_scores(tmp_path / "checkpoint")
    clips = {
        key: clip
        for batch in loader(site, plan.recipe, "test").epoch(0)
        for key, clip in zip(batch.keys, batch.frames_BTCHW, strict=True)
    }
    frames = np.stack([clips[key].numpy() for key in scores.keys])
    np.save(tmp_path / "frames.npy", frames)

    command = [sys.executable, "-W", "ignore", "-c", _PREDICT, str(folder), str(tmp_path / "frames.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    by_mlflow = json.loads(done.stdout.splitlines()[-1])
    assert Path(by_mlflow["code"]).is_relative_to(folder), "the model's own code answers"
    by_us = ServedModel(directory).predict(frames, {"top": 3}).to_dict("records")
    for rows in (by_mlflow["rows"], by_us):
        found = np.zeros_like(scores.probabilities)
        for row in rows:
            found[int(row["video"]), index.actions.index(row["action"])] = row["probability"]
        np.testing.assert_allclose(found, scores.probabilities, atol=5e-4)  # some were scored from float16 features
    _, card = load_model(directory)
    assert card.actions == index.actions
