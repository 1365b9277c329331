"""MLflow's own pages in a real browser: what a person must find there after a training."""

import uuid
from collections.abc import Generator

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Page, expect

from tavlad.tracking import comparison_url
from tests.browser import PICTURES, opened_page, picture_of
from tests.fixtures_runs import record_training
from tests.mlflow_server import MlflowServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page() -> Generator[Page]:
    with opened_page() as page:
        yield page


@pytest.fixture(scope="module")
def dataset(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two trainings of it, the first the better one, and their models."""
    dataset = f"weizmann-{uuid.uuid4().hex[:6]}"
    for seed, temporal in enumerate(("gru", "sum")):
        record_training(mlflow_server.uri, tmp_path_factory.mktemp(temporal), dataset, temporal, seed=seed)
    return dataset


def test_comparison_link_draws_the_curves_of_both_trainings(
    mlflow_server: MlflowServer, dataset: str, page: Page
) -> None:
    page.goto(comparison_url(mlflow_server.uri, f"tavlad/{dataset}", {"kind": "train", "split": "1"}))
    expect(page.get_by_text("2 matching runs")).to_be_visible()
    for name in ("ta-vlad-gru-128 split1 000000", "ta-vlad-sum split1 000000"):
        expect(page.get_by_text(name).first).to_be_visible()
    for metric in ("test/top1", "train/loss"):
        expect(page.get_by_text(metric, exact=True).first).to_be_visible()
    picture_of(page, PICTURES / "comparison.png")


def test_page_of_a_training_says_what_it_was(mlflow_server: MlflowServer, dataset: str, page: Page) -> None:
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name(f"tavlad/{dataset}")
    assert experiment is not None
    (run, _) = client.search_runs([experiment.experiment_id], "tags.kind = 'train'", order_by=["start_time ASC"])
    page.goto(f"{mlflow_server.uri}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}")
    for text in ("test/top1", "stage1.lr", "model.num_clusters", "training.seed"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    expect(page.get_by_text(f"tavlad-{dataset}-split1").first).to_be_visible()
    expect(page.get_by_text("Finished").first).to_be_visible()
    picture_of(page, PICTURES / "training.png")


def test_stages_are_shown_under_their_training(mlflow_server: MlflowServer, dataset: str, page: Page) -> None:
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name(f"tavlad/{dataset}")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id for run in runs if run.data.tags["kind"] == "train"}
    stages = [run for run in runs if run.data.tags["kind"] != "train"]
    assert len(stages) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == parents
    assert all(run.data.params["stage1.lr"] == "0.01" for run in runs), "every run has every field of the recipe"
    assert all(run.inputs.dataset_inputs[0].dataset.name == dataset for run in runs)
    page.goto(f"{mlflow_server.uri}/#/experiments/{experiment.experiment_id}/runs")
    expect(page.get_by_text("ta-vlad-sum split1").first).to_be_visible()


def test_page_of_a_model_says_where_it_comes_from(mlflow_server: MlflowServer, dataset: str, page: Page) -> None:
    name = f"tavlad-{dataset}-split1"
    page.goto(f"{mlflow_server.uri}/#/models/{name}")
    expect(page.get_by_text("Version 1", exact=False).first).to_be_visible()
    expect(page.get_by_text("best").first).to_be_visible()
    picture_of(page, PICTURES / "model.png")
    page.goto(f"{mlflow_server.uri}/#/models/{name}/versions/1")
    expect(page.get_by_text("test_top1").first).to_be_visible()
    for text in ("dataset_fingerprint", "variant", "sha256"):
        expect(page.get_by_text(text, exact=False).first).to_be_visible()
    picture_of(page, PICTURES / "version.png")
