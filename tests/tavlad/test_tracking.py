import json
import logging
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from tavlad.runlog import RUN_TAG, NullTracker, RunSpec, TrackingError
from tavlad.spool import Spool, SpoolError
from tavlad.tracking import Tracker, create_run, deliver_spool
from tests.mlflow_server import MlflowServer


@pytest.fixture
def experiment() -> str:
    return f"tavlad/{uuid.uuid4().hex[:8]}"


def start(server: MlflowServer, experiment: str, identity: str = "a-split1") -> str:
    return create_run(server.uri, experiment, "train", {RUN_TAG: identity}, {"seed": 1})


def points(server: MlflowServer, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in MlflowClient(server.uri).get_metric_history(run_id, name)]


def wait_until_delivered(tracker: Tracker) -> None:
    for _ in range(400):
        if not tracker._spool.count_undelivered():
            return
        time.sleep(0.05)
    raise AssertionError("not delivered")


def test_a_run_started_again_continues_its_mlflow_run(mlflow_server: MlflowServer, experiment: str) -> None:
    tags = {RUN_TAG: "a-split1", "variant": "ta-vlad"}
    first = create_run(mlflow_server.uri, experiment, "train", tags, {"seed": 1, "num_workers": 2})
    client = MlflowClient(mlflow_server.uri)
    client.set_terminated(first, "FAILED")
    again = create_run(mlflow_server.uri, experiment, "train", tags, {"seed": 1, "num_workers": 4, "new": True})
    other = start(mlflow_server, experiment, "b-split1")
    run = client.get_run(first)
    assert again == first
    assert other != first
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "1", "num_workers": "2", "new": "True"}
    assert run.data.tags["changed.num_workers"] == "4"
    assert run.data.tags["variant"] == "ta-vlad"


def test_a_tracker_knows_its_run_and_page_as_soon_as_the_server_does(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    spec = RunSpec(experiment=experiment, name="train", tags={RUN_TAG: "a"}, params={})
    tracker = Tracker("http://127.0.0.1:9", spec, tmp_path)
    with pytest.raises(TrackingError, match="does not answer: start it"):
        tracker.run_id(0.5)
    assert tracker.url(0) == "http://127.0.0.1:9"
    tracker.close(0.1)
    tracker = Tracker(mlflow_server.uri, spec, tmp_path)
    run_id = tracker.run_id()
    run = MlflowClient(mlflow_server.uri).get_run(run_id)
    assert tracker.url() == f"{mlflow_server.uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    tracker.finish()
    assert tracker.close() == 0
    again = Tracker(mlflow_server.uri, spec, tmp_path)
    assert again.run_id() == run_id
    assert MlflowClient(mlflow_server.uri).get_run(run_id).info.status == "RUNNING"
    assert again.close() == 0


def test_trackers_that_create_their_runs_at_the_same_time_create_each_once(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    train = RunSpec(experiment=experiment, name="train", tags={RUN_TAG: "a"}, params={})
    stages = [
        RunSpec(experiment=experiment, name=f"stage{n}", tags={RUN_TAG: f"a/{n}"}, params={}, parent=train)
        for n in range(4)
    ]
    trackers = [Tracker(mlflow_server.uri, spec, tmp_path / spec.name) for spec in (train, *stages)]
    assert [tracker.close() for tracker in trackers] == [0] * 5
    client = MlflowClient(mlflow_server.uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["stage0", "stage1", "stage2", "stage3", "train"]
    assert len({run.data.tags.get("mlflow.parentRunId") for run in runs}) == 2


def test_a_stage_is_shown_under_its_training(mlflow_server: MlflowServer, experiment: str) -> None:
    parent = start(mlflow_server, experiment)
    child = create_run(mlflow_server.uri, experiment, "stage1", {RUN_TAG: "a-split1/stage1"}, {}, parent=parent)
    assert MlflowClient(mlflow_server.uri).get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_everything_told_arrives(mlflow_server: MlflowServer, experiment: str, tmp_path: Path) -> None:
    run_id = start(mlflow_server, experiment)
    picture = tmp_path / "confusion.png"
    picture.write_bytes(b"as it was when logged")
    folder = tmp_path / "report"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "index.html").write_text("hello")
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path / "spool")
    tracker.log_params({"lr": 0.01, "recipe": "x" * 7000})
    tracker.set_tags({"git": "abc"})
    tracker.log_dataset("hmdb51", "f" * 64, "s3://user:hush@bucket/datasets/hmdb51", "training")
    tracker.log_artifact(picture, "plots")
    tracker.log_artifact(folder)
    picture.write_bytes(b"changed after")
    for epoch in range(3):
        tracker.log_metrics({"train/loss": 1.0 / (1 + epoch), "train/top1": float("nan")}, epoch)
    tracker.finish()
    assert tracker.close() == 0
    client = MlflowClient(mlflow_server.uri)
    run = client.get_run(run_id)
    assert points(mlflow_server, run_id, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1.0 / 3)]
    assert [step for step, _ in points(mlflow_server, run_id, "train/top1")] == [0, 1, 2]
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.01"
    assert run.data.params["recipe"] == "(7000 characters, see artifact params/recipe.txt)"
    assert run.data.tags["git"] == "abc"
    assert run.inputs.dataset_inputs[0].dataset.name == "hmdb51"
    assert "hush" not in run.inputs.dataset_inputs[0].dataset.source
    at = tmp_path / "downloaded"
    at.mkdir()
    client.download_artifacts(run_id, "", str(at))
    assert (at / "params/recipe.txt").read_text() == "x" * 7000
    assert (at / "plots/confusion.png").read_bytes() == b"as it was when logged"
    assert (at / "report/parts/index.html").read_text() == "hello"
    assert not list((tmp_path / "spool/files").iterdir())


def test_a_server_that_stops_answering_neither_slows_the_run_nor_loses_a_point(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    run_id = start(mlflow_server, experiment)
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path)
    tracker.log_metrics({"train/loss": 0.0}, 0)
    wait_until_delivered(tracker)
    mlflow_server.freeze()
    try:
        began = time.monotonic()
        for epoch in range(1, 50):
            tracker.log_metrics({"train/loss": float(epoch)}, epoch)
        assert time.monotonic() - began < 3  # one answer awaited would take as long
        time.sleep(4)
        assert tracker._spool.count_undelivered() == 49
    finally:
        mlflow_server.thaw()
    tracker.log_metrics({"train/loss": 50.0}, 50)
    assert tracker.close() == 0
    assert points(mlflow_server, run_id, "train/loss") == [(epoch, float(epoch)) for epoch in range(51)]


@pytest.mark.chaos
def test_points_told_while_the_server_is_down_are_there_once_and_in_order_when_it_is_back(
    tmp_path: Path, experiment: str
) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    run_id = start(server, experiment)
    tracker = Tracker(server.uri, run_id, tmp_path / "spool")
    tracker.log_metrics({"train/loss": 0.0}, 0)
    wait_until_delivered(tracker)
    server.stop()
    try:
        for epoch in range(1, 300):
            tracker.log_metrics({"train/loss": float(epoch), "train/top1": 0.5}, epoch)
        server.start()
        assert tracker.close(60) == 0
        assert points(server, run_id, "train/loss") == [(epoch, float(epoch)) for epoch in range(300)]
        assert points(server, run_id, "train/top1") == [(epoch, 0.5) for epoch in range(1, 300)]
    finally:
        server.stop()


def test_a_run_the_server_never_saw_is_told_whole_by_a_later_process(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    nobody = "http://127.0.0.1:9"
    train = RunSpec(experiment=experiment, name="train", tags={RUN_TAG: "a"}, params={"seed": 1})
    stage = RunSpec(experiment=experiment, name="stage1", tags={RUN_TAG: "a/1"}, params={"lr": 0.1}, parent=train)
    with pytest.raises(TrackingError, match="does not answer: start it"):
        create_run(nobody, experiment, "train", train.tags, train.params)
    tracker = Tracker(nobody, stage, tmp_path)
    tracker.log_metrics({"train/loss": 2.0}, 0)
    tracker.finish("FAILED")
    assert tracker.close(0.1) == 3
    assert deliver_spool(mlflow_server.uri, tmp_path) == 0
    parent_id = create_run(mlflow_server.uri, experiment, "train", train.tags, train.params)
    stage_id = create_run(mlflow_server.uri, experiment, "stage1", stage.tags, stage.params, parent=parent_id)
    client = MlflowClient(mlflow_server.uri)
    assert points(mlflow_server, stage_id, "train/loss") == [(0, 2.0)]
    assert client.get_run(stage_id).data.tags["mlflow.parentRunId"] == parent_id
    assert client.get_run(stage_id).data.params == {"lr": "0.1"}
    assert len(client.search_runs([client.get_experiment_by_name(experiment).experiment_id])) == 2


def tell_and_die(uri: str, run_id: str, spool: Path) -> None:
    """Deliver two epochs and end before the spool knows that they were delivered."""
    tracker = Tracker(uri, run_id, spool)
    tracker._spool.set_mark = lambda mark: os._exit(9) if mark.offset > 200 else Spool.set_mark(tracker._spool, mark)
    tracker.log_metrics({"train/loss": 0.0}, 0)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    time.sleep(30)


def test_points_delivered_by_a_process_that_died_are_not_delivered_again(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    run_id = start(mlflow_server, experiment)
    process = multiprocessing.get_context("spawn").Process(
        target=tell_and_die, args=(mlflow_server.uri, run_id, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    with (tmp_path / "lines.jsonl").open("ab") as file:
        file.write(b'{"kind":"metrics","st')  # and a line it did not finish
    assert points(mlflow_server, run_id, "train/loss")
    before = Spool(tmp_path)
    assert before.count_undelivered() >= 1
    before.close()
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path)
    tracker.log_metrics({"train/loss": 1.5}, 1)  # the epoch that was under way is done again
    tracker.log_metrics({"train/loss": 2.0}, 2)
    assert tracker.close() == 0
    assert points(mlflow_server, run_id, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_batch_the_server_took_although_the_answer_was_lost_is_not_sent_again(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = start(mlflow_server, experiment)
    log_batch, sent = MlflowClient.log_batch, list[int]()

    def lose_the_first_answer(client: MlflowClient, run: str, metrics: list[Metric], synchronous: bool) -> None:
        log_batch(client, run, metrics=metrics, synchronous=synchronous)
        sent.extend(metric.step for metric in metrics)
        if len(sent) == 1:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", lose_the_first_answer)
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path)
    tracker.run_id()
    tracker.log_metrics({"train/loss": 1.0}, 0)
    while not sent:
        time.sleep(0.01)
    tracker.log_metrics({"train/loss": 0.5}, 1)
    assert tracker.close() == 0
    assert sent == [0, 1]
    assert points(mlflow_server, run_id, "train/loss") == [(0, 1.0), (1, 0.5)]


def test_an_epoch_done_again_on_another_machine_is_drawn_once(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    run_id = start(mlflow_server, experiment)
    for machine in ("a", "b"):
        tracker = Tracker(mlflow_server.uri, run_id, tmp_path / machine)
        tracker.log_metrics({"test/top1": 0.5}, 7)
        assert tracker.close() == 0
    assert points(mlflow_server, run_id, "test/top1") == [(7, 0.5)]


def test_what_the_server_refuses_is_kept_aside_and_stops_nothing(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Tracker(mlflow_server.uri, "0" * 32, tmp_path / "gone")
    gone.log_metrics({"train/loss": 1.0}, 0)
    gone.set_tags({"git": "abc"})
    with caplog.at_level(logging.WARNING):
        assert gone.close() == 0
    rejected = [json.loads(line) for line in (tmp_path / "gone/rejected.jsonl").read_text().splitlines()]
    assert [line["record"]["kind"] for line in rejected] == ["run", "metrics", "tags"]
    assert "MLflow refused metrics" in caplog.text


def test_credentials_are_not_recorded(mlflow_server: MlflowServer, experiment: str, tmp_path: Path) -> None:
    secrets = {"s3.secret_key": "hush", "mlflow": "http://me:hush@host:5000/x", "token": "hush", "num_tokens": 3}
    run_id = create_run(mlflow_server.uri, experiment, "train", {RUN_TAG: "a", "password": "hush"}, secrets)
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path)
    tracker.log_params({"aws.secret_access_key": "hush"})
    tracker.set_tags({"where": "s3 at https://a:hush@b and https://c:hush@d"})
    assert tracker.close() == 0
    run = MlflowClient(mlflow_server.uri).get_run(run_id)
    assert "hush" not in str(run.to_dictionary())
    assert "hush" not in (tmp_path / "lines.jsonl").read_text()
    assert run.data.params["mlflow"] == "http://host:5000/x"
    assert run.data.params["num_tokens"] == "3"


def test_a_name_mlflow_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    tracker = Tracker("http://127.0.0.1:9", "0" * 32, tmp_path)
    with pytest.raises(ValueError, match="metric name 'loss:train' is not one"):
        tracker.log_metrics({"loss:train": 1.0}, 0)
    tracker.close(0)


def test_a_spool_is_held_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tavlad.spool._SECONDS_TO_WAIT_FOR_LOCK", 0.1)
    holder = Spool(tmp_path)
    with pytest.raises(SpoolError, match="is held by another process"):
        Spool(tmp_path)
    assert Spool.is_held(tmp_path)
    holder.close()
    assert not Spool.is_held(tmp_path)
    Spool(tmp_path).close()


def test_system_metrics_reach_the_run(mlflow_server: MlflowServer, experiment: str, tmp_path: Path) -> None:
    run_id = start(mlflow_server, experiment)
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path)
    for percent in (12.5, 99.0):
        tracker.log_system({"node1/cpu_utilization_percentage": percent})
        time.sleep(1.1)
    assert tracker.close() == 0
    steps = [step for step, _ in points(mlflow_server, run_id, "system/node1/cpu_utilization_percentage")]
    assert len(steps) == 2
    assert 0 <= steps[0] < steps[1] < 60


@pytest.fixture
def broken_store(
    mlflow_server: MlflowServer, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> Generator[Callable[[], None]]:
    """The server answers uploads of this experiment with status 500, until this is called."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # as the verbs set it
    experiment_id = MlflowClient(mlflow_server.uri).create_experiment(experiment)
    in_the_way = mlflow_server.artifacts / experiment_id
    in_the_way.parent.mkdir(exist_ok=True)
    in_the_way.write_text("a file where a folder is to be")
    yield lambda: in_the_way.unlink(missing_ok=True)
    if in_the_way.is_file():
        in_the_way.unlink()


def artifacts_of(server: MlflowServer, run_id: str, folder: str = "") -> list[str]:
    return sorted(file.path for file in MlflowClient(server.uri).list_artifacts(run_id, folder))


def test_an_artifact_store_that_fails_holds_up_only_artifacts(
    mlflow_server: MlflowServer,
    experiment: str,
    broken_store: Callable[[], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spool, picture = tmp_path / "spool", tmp_path / "a.png"
    picture.write_bytes(b"png")
    run_id = start(mlflow_server, experiment)
    tracker = Tracker(mlflow_server.uri, run_id, spool)
    tracker.log_params({"recipe": "x" * 7000})
    tracker.log_artifact(picture)
    for epoch in range(3):
        tracker.log_metrics({"train/loss": float(epoch)}, epoch)
    tracker.finish()
    assert tracker.close(120) == 2, "tried for ever"
    assert points(mlflow_server, run_id, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert MlflowClient(mlflow_server.uri).get_run(run_id).info.status == "FINISHED"
    assert "2 records for MLflow wait in" in caplog.text
    assert "answers again" not in caplog.text
    caplog.clear()
    assert deliver_spool(mlflow_server.uri, spool, 120) == 2
    assert "artifact store failed" in caplog.text
    broken_store()
    assert deliver_spool(mlflow_server.uri, spool) == 0
    assert artifacts_of(mlflow_server, run_id) == ["a.png", "params"]
    assert not list((spool / "files").iterdir())


def test_a_run_is_created_although_the_store_cannot_take_its_long_settings(
    mlflow_server: MlflowServer, experiment: str, broken_store: Callable[[], None], tmp_path: Path
) -> None:
    train = RunSpec(experiment=experiment, name="train", tags={RUN_TAG: "a"}, params={"recipe": "x" * 7000})
    stage = RunSpec(experiment=experiment, name="stage1", tags={RUN_TAG: "a/1"}, params=train.params, parent=train)
    for _ in range(2):  # a run that goes on tells its settings again
        tracker = Tracker(mlflow_server.uri, stage, tmp_path)
        tracker.log_metrics({"train/loss": 1.0}, 0)
        run_id = tracker.run_id(120)
        assert tracker.close(120) == 2
    assert points(mlflow_server, run_id, "train/loss") == [(0, 1.0)]
    broken_store()
    tracker = Tracker(mlflow_server.uri, stage, tmp_path)  # the next process delivers what the last one could not
    assert tracker.close() == 0
    parent_id = MlflowClient(mlflow_server.uri).get_run(run_id).data.tags["mlflow.parentRunId"]
    for each in (run_id, parent_id):
        assert artifacts_of(mlflow_server, each, "params") == ["params/recipe.txt"]


def test_one_artifact_that_cannot_be_sent_holds_up_no_other(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run_id = start(mlflow_server, experiment)
    experiment_id = MlflowClient(mlflow_server.uri).get_run(run_id).info.experiment_id
    folder = mlflow_server.artifacts / experiment_id / run_id / "artifacts"
    (folder / "0.png").mkdir(parents=True)  # in the way of the first one
    tracker = Tracker(mlflow_server.uri, run_id, tmp_path / "spool")
    for number in range(12):
        picture = tmp_path / f"{number}.png"
        picture.write_bytes(b"png")
        tracker.log_artifact(picture)
    assert tracker.close(120) == 1
    assert sum(path.is_file() for path in folder.iterdir()) == 11


def test_the_tracker_that_is_off_takes_everything(tmp_path: Path) -> None:
    tracker = NullTracker()
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.log_artifact(tmp_path / "absent.png")
    tracker.finish()
    assert tracker.close() == 0
