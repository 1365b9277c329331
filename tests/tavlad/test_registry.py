import multiprocessing
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tavlad import promotion
from tavlad import pull as pull_module
from tavlad.promotion import promote, roll_back
from tavlad.pull import pull
from tavlad.registry import Registered, ServedCode, register
from tavlad.registry_queries import registered_models
from tavlad.runlog import RUN_TAG, TrackingError
from tavlad.tracking import create_run
from tests.mlflow_server import MlflowServer


@pytest.fixture
def name() -> str:
    return f"tavlad-{uuid.uuid4().hex[:8]}-split1"


@pytest.fixture
def code(tmp_path: Path) -> ServedCode:
    return write_code(tmp_path)


def write_code(folder: Path) -> ServedCode:
    """A served program that returns what its checkpoint's weights say."""
    room = folder / "served_numbers"
    room.mkdir()
    (room / "__init__.py").write_text(
        "import pathlib\n"
        "class Model:\n"
        "    def __init__(self, path):\n"
        "        self.text = (pathlib.Path(path) / 'weights.safetensors').read_text()\n"
        "    def predict(self, model_input, params=None):\n"
        "        return [self.text] * params['top']\n"
        "_load_pyfunc = Model\n"
    )
    return ServedCode(
        loader_module="served_numbers",
        code_paths=(room,),
        pip_requirements=("numpy",),
        outputs=(("video", "string"),),
        params={"top": 5},
    )


def checkpoint(folder: Path, text: str) -> Path:
    directory = folder / f"checkpoint-{text}"
    directory.mkdir(exist_ok=True)
    (directory / "weights.safetensors").write_text(text)
    (directory / "config.json").write_text("{}")
    (directory / "state.pt").write_bytes(b"a pickle")
    return directory


class Shop:
    """Registers made-up trainings under one name."""

    def __init__(self, server: MlflowServer, name: str, code: ServedCode, folder: Path) -> None:
        self.server, self.name, self.code, self.folder = server, name, code, folder
        self.client = MlflowClient(server.uri)

    def register(self, training: str, accuracy: float, weights: str | None = None) -> Registered:
        run_id = create_run(self.server.uri, f"tavlad/{self.name}", training, {RUN_TAG: training}, {})
        return register(
            self.server.uri,
            checkpoint(self.folder, weights or training),
            run_id=run_id,
            name=self.name,
            tags={"variant": "ta-vlad", "test_top5": "0.9"},
            accuracy=accuracy,
            code=self.code,
        )

    def add(self, accuracy: float) -> ModelVersion:
        """One more version of the first one's files, which has not yet tried to be the best."""
        first = self.client.get_model_version(self.name, "1")
        tags = {"test_top1": repr(accuracy)}
        return self.client.create_model_version(
            self.name, first.source, run_id=first.run_id, model_id=first.source.removeprefix("models:/"), tags=tags
        )

    def best(self) -> int:
        return int(self.client.get_model_version_by_alias(self.name, "best").version)


@pytest.fixture
def shop(mlflow_server: MlflowServer, name: str, code: ServedCode, tmp_path: Path) -> Shop:
    return Shop(mlflow_server, name, code, tmp_path)


def test_best_moves_only_to_a_strictly_more_accurate_version(shop: Shop) -> None:
    first = shop.register("a", 0.5)
    assert (first.version, first.is_best, first.previous_best) == (1, True, None)
    worse, equal = shop.register("b", 0.25), shop.register("c", 0.5)
    assert (worse.version, worse.is_best, worse.previous_best) == (2, False, 1)
    assert (equal.version, equal.is_best) == (3, False)
    better = shop.register("d", 0.75)
    assert (better.version, better.is_best, better.previous_best) == (4, True, 1)
    assert shop.best() == 4


def test_a_run_registered_again_is_the_same_version(shop: Shop) -> None:
    shop.register("a", 0.5)
    shop.register("b", 0.75)
    again = shop.register("a", 0.5)
    assert (again.version, again.is_best) == (1, False)
    assert len(registered_models(shop.server.uri)) >= 2
    assert shop.register("a", 0.8, weights="a, trained on").version == 3


def test_a_version_chosen_by_hand_gives_way_only_to_a_better_new_one(shop: Shop) -> None:
    for training, accuracy in (("a", 0.25), ("b", 0.75)):
        shop.register(training, accuracy)
    shop.client.set_registered_model_alias(shop.name, "best", "1")
    assert not shop.register("c", 0.125).is_best
    assert shop.best() == 1
    assert shop.register("d", 0.5).is_best


def test_a_version_of_other_means_without_an_accuracy_gives_way(shop: Shop) -> None:
    first = shop.register("a", 0.0)
    shop.client.delete_model_version_tag(shop.name, "1", "test_top1")
    assert first.is_best
    assert shop.register("b", 0.0).is_best


def test_registrations_at_the_same_time_leave_the_most_accurate_as_best(shop: Shop) -> None:
    accuracies = [0.375, 0.75, 0.125, 0.875, 0.25, 0.625, 0.5, 0.9375]
    shop.register("first", 0.0)
    versions = [shop.add(accuracy) for accuracy in accuracies]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(promotion.contend, shop.client, shop.name, version) for version in versions]:
            done.result()
    assert shop.best() == int(versions[-1].version)


def test_a_better_version_that_is_overwritten_in_between_is_put_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.register("holder", 0.25)
    slow, quick = shop.add(0.5), shop.add(0.75)
    set_alias = MlflowClient.set_registered_model_alias

    def let_the_quick_one_pass(client: MlflowClient, name: str, alias: str, version: str) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", set_alias)
        promotion.contend(client, name, quick)
        assert shop.best() == int(quick.version)
        set_alias(client, name, alias, version)
        assert shop.best() == int(slow.version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", let_the_quick_one_pass)
    promotion.contend(shop.client, shop.name, slow)
    assert shop.best() == int(quick.version)


def test_registering_a_done_training_again_leaves_a_rollback_alone(shop: Shop) -> None:
    shop.register("a", 0.25)
    shop.register("b", 0.75)
    roll_back(shop.server.uri, shop.name, "b fails on night videos")
    again = shop.register("b", 0.75)
    assert (again.version, again.is_best, again.previous_best, shop.best()) == (2, False, 1, 1)
    shop.client.set_registered_model_alias(shop.name, "best", "2")  # and one made by other means
    assert not shop.register("a", 0.25).is_best
    assert shop.best() == 2


class Died(BaseException):
    """A process that ends here."""


def register_and_die(shop: Shop, training: str, accuracy: float, before: str, is_last: Callable[..., bool]) -> None:
    """Register, and end at the first call of the client's `before` whose arguments are `is_last`."""
    method = getattr(MlflowClient, before)

    def die(client: MlflowClient, *arguments: str) -> None:
        if is_last(*arguments):
            raise Died
        method(client, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, before, die)
        with pytest.raises(Died):
            shop.register(training, accuracy)


def test_a_version_whose_process_died_as_it_took_best_does_not_take_it_later(shop: Shop) -> None:
    shop.register("a", 0.25)
    register_and_die(shop, "b", 0.75, "set_model_version_tag", lambda *told: told[-1].startswith("taken"))
    assert shop.best() == 2
    roll_back(shop.server.uri, shop.name, "b fails on night videos")
    assert shop.register("c", 0.5).is_best
    assert not shop.register("b", 0.75).is_best
    assert shop.best() == 3


def test_what_earlier_code_left_where_it_died_is_void(shop: Shop) -> None:
    for training, accuracy in (("a", 0.25), ("b", 0.75)):
        shop.register(training, accuracy)
    roll_back(shop.server.uri, shop.name, "b fails on night videos")
    shop.client.set_model_version_tag(shop.name, "2", "tavlad.best", "taking 0123456789abcdef")
    assert shop.register("c", 0.5).is_best
    assert shop.best() == 3


def test_a_registration_that_died_before_it_contended_does_so_when_repeated(shop: Shop) -> None:
    shop.register("a", 0.25)
    register_and_die(shop, "b", 0.75, "set_registered_model_alias", lambda *_: True)
    assert shop.best() == 1
    assert shop.register("b", 0.75).is_best
    register_and_die(shop, "c", 0.875, "set_registered_model_alias", lambda *_: True)
    promote(shop.server.uri, f"{shop.name}/1", "b fails on night videos, and so will c")
    assert not shop.register("c", 0.875).is_best
    assert shop.best() == 1


def test_an_upload_that_breaks_off_leaves_no_version(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.register("a", 0.25)

    def break_off(client: MlflowClient, model_id: str, folder: str) -> None:
        raise MlflowException("connection lost")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_model_artifacts", break_off)
        with pytest.raises(TrackingError, match="connection lost"):
            shop.register("b", 0.75)
    assert shop.best() == 1
    assert [row.version for row in registered_models(shop.server.uri) if row.name == shop.name] == [1]
    assert shop.register("b", 0.75).is_best


def test_a_model_that_the_store_did_not_keep_whole_is_not_registered(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_artifacts = MlflowClient.list_logged_model_artifacts

    def without_weights(client: MlflowClient, model_id: str, path: str | None = None) -> list[object]:
        return [entry for entry in list_artifacts(client, model_id, path) if "weights" not in entry.path]

    monkeypatch.setattr(MlflowClient, "list_logged_model_artifacts", without_weights)
    with pytest.raises(TrackingError, match=r"did not keep data/checkpoint/weights.safetensors whole"):
        shop.register("a", 0.5)
    assert shop.name not in [row.name for row in registered_models(shop.server.uri)]


def test_a_registered_model_says_where_it_comes_from(shop: Shop) -> None:
    shop.register("a", 0.123456789)
    version = shop.client.get_model_version_by_alias(shop.name, "best")
    assert float(version.tags["test_top1"]) == 0.123456789
    assert version.tags["variant"] == "ta-vlad"
    assert version.tags["run"] == version.run_id
    rows = [row for row in registered_models(shop.server.uri) if row.name == shop.name]
    assert [(row.version, row.is_best, row.tags["test_top5"]) for row in rows] == [(1, True, "0.9")]


def test_a_model_is_fetched_whole_and_without_pickles(shop: Shop, tmp_path: Path) -> None:
    shop.register("a", 0.5)
    shop.register("b", 0.25)
    uri = shop.server.uri
    best = pull(uri, f"{shop.name}@best", tmp_path / "best").directory
    assert (best / "weights.safetensors").read_text() == "a"
    assert sorted(path.name for path in best.iterdir()) == ["config.json", "weights.safetensors"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (pull(uri, f"models:/{shop.name}/2", empty).directory / "weights.safetensors").read_text() == "b"
    assert pull(uri, f"models:/{shop.name}@best", best).directory == best
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        pull(uri, f"{shop.name}/2", best)
    assert [path.name for path in tmp_path.glob(".*partial*")] == []


def test_what_is_not_registered_is_said_with_what_is(shop: Shop, tmp_path: Path) -> None:
    shop.register("a", 0.5)
    uri = shop.server.uri
    with pytest.raises(TrackingError, match=f"no registered model 'absent': registered are .*{shop.name}"):
        pull(uri, "absent@best", tmp_path / "new")
    with pytest.raises(TrackingError, match=r"has no version @worst: it has versions 1"):
        pull(uri, f"{shop.name}@worst", tmp_path / "new")
    with pytest.raises(TrackingError, match="has no version 7: it has versions 1"):
        pull(uri, f"{shop.name}/7", tmp_path / "new")
    with pytest.raises(ValueError, match="write NAME@best or NAME/VERSION"):
        pull(uri, "plain", tmp_path / "new")
    with pytest.raises(TrackingError, match="does not answer: start it"):
        pull("http://127.0.0.1:9", f"{shop.name}@best", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_model_is_not_handed_out(shop: Shop, tmp_path: Path) -> None:
    shop.register("a", 0.5)
    shop.client.set_model_version_tag(shop.name, "1", "sha256", "0" * 64)
    with pytest.raises(TrackingError, match="was damaged on its way"):
        pull(shop.server.uri, f"{shop.name}@best", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_mlflow_itself_loads_a_registered_model(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.register("a", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shop.server.uri)
    model = mlflow.pyfunc.load_model(f"models:/{shop.name}@best")
    assert model.predict(["x"]) == ["a"] * 5
    assert model.predict(["x"], params={"top": 2}) == ["a"] * 2
    assert model.metadata.signature.outputs.input_names() == ["video"]
    source = shop.client.get_model_version(shop.name, "1").source
    files = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path / "all"))).rglob("*.*")
    assert {path.suffix for path in files} == {".json", ".safetensors", ".py", ".yaml", ".txt"}


def test_a_version_is_promoted_and_rolled_back_by_hand_with_the_reason_kept(shop: Shop) -> None:
    for training, accuracy in (("a", 0.25), ("b", 0.5), ("c", 0.75)):
        shop.register(training, accuracy)
    uri = shop.server.uri
    moved = roll_back(uri, shop.name, "c fails on  night videos")
    assert (moved.version, moved.previous, shop.best()) == (2, 3, 2)
    assert shop.client.get_model_version(shop.name, "2").tags["best.reason"] == "c fails on night videos"
    assert roll_back(uri, f"{shop.name}@best", "b too").version == 1
    with pytest.raises(TrackingError, match=rf"version 1 of {shop.name} followed no other version: name the version"):
        roll_back(uri, shop.name, "a too")
    assert promote(uri, f"{shop.name}/3", "it was the camera").previous == 1
    assert shop.best() == 3
    assert roll_back(uri, shop.name, "it was not").version == 1
    with pytest.raises(TrackingError, match="is the best already"):
        promote(uri, f"{shop.name}/1", "again")
    with pytest.raises(ValueError, match="the reason is empty"):
        promote(uri, f"{shop.name}/2", " ")
    with pytest.raises(TrackingError, match="there is no registered model 'absent'"):
        roll_back(uri, "absent", "why not")
    rows = [row for row in registered_models(uri, shop.name) if row.is_best]
    assert [row.version for row in rows] == [1]
    assert not [tag for row in registered_models(uri, shop.name) for tag in row.tags if tag.startswith("tavlad.")]


def test_a_pull_that_was_cut_goes_on_where_it_was(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.register("a", 0.5, weights="0123456789")
    partial = tmp_path / f".new.{shop.client.get_model_version(shop.name, '1').tags['sha256'][:12]}.partial"
    asked: list[str] = []
    http_request = pull_module.http_request

    def note(creds: object, endpoint: str, method: str, **options: Any) -> object:
        asked.append(f"{endpoint.rpartition('/')[2]} {options['extra_headers'].get('Range', 'whole')}")
        return http_request(creds, endpoint, method, **options)

    monkeypatch.setattr(pull_module, "http_request", note)
    partial.mkdir()
    (partial / "weights.safetensors").write_text("0123")
    seen: list[tuple[int, int]] = []
    pulled = pull(shop.server.uri, f"{shop.name}@best", tmp_path / "new", lambda *bytes_of: seen.append(bytes_of))
    assert (pulled.directory / "weights.safetensors").read_text() == "0123456789"
    assert asked == ["config.json whole", "weights.safetensors bytes=4-"]
    assert (seen[-1], pulled.version) == ((12, 12), 1)
    assert not partial.exists()


def test_a_pull_goes_on_from_damaged_bytes_only_once(shop: Shop, tmp_path: Path) -> None:
    shop.register("a", 0.5, weights="0123456789")
    partial = tmp_path / f".new.{shop.client.get_model_version(shop.name, '1').tags['sha256'][:12]}.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_text("9999")
    with pytest.raises(TrackingError, match="was damaged on its way"):
        pull(shop.server.uri, f"{shop.name}@best", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert pull(shop.server.uri, f"{shop.name}@best", tmp_path / "new").version == 1


def register_several(uri: str, name: str, folder: Path, accuracies: list[int]) -> None:
    code = write_code(folder)
    for accuracy in accuracies:
        training = f"{name}-{accuracy}"
        run_id = create_run(uri, f"tavlad/{name}", training, {RUN_TAG: training}, {})
        directory = checkpoint(folder, training)
        register(uri, directory, run_id=run_id, name=name, tags={}, accuracy=accuracy / 100, code=code)


@pytest.mark.slow
@pytest.mark.chaos
def test_fifty_registrations_by_several_processes_leave_the_most_accurate_as_best(
    mlflow_server: MlflowServer, name: str, tmp_path: Path
) -> None:
    order = np.random.default_rng().permutation(np.arange(1, 51)).tolist()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        jobs: list[Future[None]] = []
        for process in range(4):
            (tmp_path / str(process)).mkdir()
            part = order[process::4]
            jobs.append(pool.submit(register_several, mlflow_server.uri, name, tmp_path / str(process), part))
        for job in jobs:
            job.result()
    rows = registered_models(mlflow_server.uri, name)
    assert sorted(row.version for row in rows) == list(range(1, 51))
    (best,) = [row for row in rows if row.is_best]
    assert float(best.tags["test_top1"]) == 0.5, f"registered in the order {order}"
