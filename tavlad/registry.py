"""Registered models: put one in, find the best, fetch one. A model is safetensors, JSON and source files, no pickle.

`best` is moved by a compare-and-set built from what MLflow has. A version about to take the alias first says so in a
tag, with a value of its own; after taking it, it looks for versions that took it since it read the old holder. If one
of them is better, that one was overwritten, and is put back. So the last to write leaves the best of those registered
at the same time, and a version put there by hand gives way only to a better new one.

One file, though long: it is the only door to the registry, and each half uses the other's few queries.
"""

import contextlib
import hashlib
import math
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from tavlad.runlog import TrackingError
from tavlad.spool import without_credentials, without_user
from tavlad.tracking import require_answer

with warnings.catch_warnings(action="ignore"):  # MLflow warns of type hints of its own
    import mlflow.pyfunc

BEST = "best"
"""The alias of the version with the highest accuracy on the test part."""
ACCURACY_TAG = "test_top1"
DIGEST_TAG = "sha256"
"""Tag of a version: digest of its checkpoint directory."""

_TURN_TAG = "tavlad.best"
_TAKING, _TAKEN = "taking ", "taken "
_FILES = (".safetensors", ".json")
_NAME_IN_RUN = "model"
_VERSIONS_PER_PAGE = 200
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedCode:
    """The program that answers for a registered model where none of ours is installed."""

    loader_module: str
    """Module with `_load_pyfunc(directory)`."""
    code_paths: tuple[Path, ...]
    """Packages that travel with the model."""
    pip_requirements: tuple[str, ...]
    """What it needs besides MLflow."""
    outputs: tuple[tuple[str, Literal["string", "long", "double"]], ...]
    """Columns of the table it returns."""
    params: Mapping[str, int]
    """Settings of a prediction and their defaults."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A run's model in the registry."""

    name: str
    version: int
    is_best: bool
    """Whether it holds the alias `best` now."""
    previous_best: int | None
    """The version that held it before this registration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """A row of the registry."""

    name: str
    version: int
    run_id: str
    is_best: bool
    created: int
    """Milliseconds since 1970."""
    tags: Mapping[str, str]


def register(
    tracking_uri: str,
    model_directory: Path,
    *,
    run_id: str,
    name: str,
    tags: Mapping[str, str],
    accuracy: float,
    code: ServedCode,
) -> Registered:
    """Register the checkpoint directory of a run as a version of `name`, and move `best` to it if it is more accurate.

    `accuracy` is test/top1 of the last epoch, from 0 to 1. The version becomes visible after all its files are stored;
    registering the same run and weights again finds it. TrackingError if the server does not answer or refuses.
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}: it must be a share from 0 to 1")
    with _said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        digest = digest_of(model_directory)
        version = _version_of_run(client, name, run_id, digest)
        if version is None:
            model_id = _upload(client, model_directory, run_id, code)
            own_tags = {"run": run_id, ACCURACY_TAG: repr(accuracy), DIGEST_TAG: digest}
            version = _create_version(client, name, model_id, run_id, without_credentials(tags) | own_tags)
        previous = _holder(client, name)
        _contend(client, name, version)
        holder = _holder(client, name)
        return Registered(
            name=name,
            version=_number(version),
            is_best=holder is not None and _number(holder) == _number(version),
            previous_best=None if previous is None else _number(previous),
        )


def download_model(tracking_uri: str, reference: str, directory: Path) -> Path:
    """Fetch the checkpoint directory of "NAME@best", "NAME/3" or the same after "models:/" into `directory`, whole.

    `directory` must be empty or absent, or hold that very model already. TrackingError for what is not there.
    """
    with _said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        version = _resolve(client, reference)
        if directory.is_dir() and any(directory.iterdir()):
            if version.tags.get(DIGEST_TAG) == digest_of(directory):
                return directory
            raise ValueError(f"{directory} is not empty: name a new folder for {reference}")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.partial-", dir=directory.parent) as partial:
            fetched = _fetch(client, tracking_uri, version, Path(partial))
            expected = version.tags.get(DIGEST_TAG)
            if expected is not None and digest_of(fetched) != expected:
                raise TrackingError(f"{reference} was damaged on its way or in the artifact store: fetch it again")
            if directory.is_dir():
                directory.rmdir()
            fetched.rename(directory)
    return directory


def registered_models(tracking_uri: str) -> list[RegisteredVersion]:
    """Every version of every registered model, by name, newest first."""
    rows: list[RegisteredVersion] = []
    with _said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        for name in _names(client):
            holder = _holder(client, name)
            rows += [
                RegisteredVersion(
                    name=name,
                    version=_number(version),
                    run_id=version.run_id or "",
                    is_best=holder is not None and _number(holder) == _number(version),
                    created=version.creation_timestamp or 0,
                    tags={key: value for key, value in version.tags.items() if key != _TURN_TAG},
                )
                for version in sorted(_versions(client, name), key=_number, reverse=True)
            ]
    return rows


def digest_of(directory: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint directory's weights and card."""
    digest = hashlib.sha256()
    for path in _model_files(directory):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _model_files(directory: Path) -> list[Path]:
    """What travels: weights and JSON. Training states, which are pickles, never do."""
    return sorted(path for path in directory.iterdir() if path.suffix in _FILES)


def _upload(client: MlflowClient, directory: Path, run_id: str, code: ServedCode) -> str:
    """Store the model's files under the run and return MLflow's id of them; READY only when all are there."""
    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name=_NAME_IN_RUN, source_run_id=run_id)
    with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
        data, packed = Path(folder) / "checkpoint", Path(folder) / "model"
        data.mkdir()
        for path in _model_files(directory):
            shutil.copyfile(path, data / path.name)
        with warnings.catch_warnings(action="ignore"):  # MLflow asks for an example; ours would be a video
            mlflow.pyfunc.save_model(
                path=packed,
                mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
                loader_module=code.loader_module,
                data_path=str(data),
                code_paths=[str(path) for path in code.code_paths],
                pip_requirements=list(code.pip_requirements),
                signature=_signature(code),
            )
        for cache in packed.rglob("__pycache__"):
            shutil.rmtree(cache)
        client.log_model_artifacts(logged.model_id, str(packed))
        sizes = {str(path.relative_to(packed)): path.stat().st_size for path in packed.rglob("*") if path.is_file()}
    stored = _stored_sizes(client, logged.model_id)
    if stored != sizes:
        client.finalize_logged_model(logged.model_id, "FAILED")
        wrong = sorted(name for name in sizes if stored.get(name) != sizes[name])
        raise TrackingError(f"the artifact store did not keep {', '.join(wrong)} whole: look at its disk and try again")
    client.finalize_logged_model(logged.model_id, "READY")
    return logged.model_id


def _signature(code: ServedCode) -> ModelSignature:
    """Columns out and settings in. Inputs are left open: no MLflow schema describes "paths, bytes or a uint8 array"."""
    return ModelSignature(
        outputs=Schema([ColSpec(kind, column) for column, kind in code.outputs]),
        params=ParamSchema([ParamSpec(name, "long", default) for name, default in code.params.items()]),
    )


def _stored_sizes(client: MlflowClient, model_id: str, path: str | None = None) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in client.list_logged_model_artifacts(model_id, path):
        sizes |= _stored_sizes(client, model_id, entry.path) if entry.is_dir else {entry.path: entry.file_size or 0}
    return sizes


def _create_version(client: MlflowClient, name: str, model_id: str, run_id: str, tags: dict[str, str]) -> ModelVersion:
    with contextlib.suppress(MlflowException):  # it exists, or the next call says what is wrong
        client.create_registered_model(name)
    source = f"models:/{model_id}"
    version = client.create_model_version(name, source, run_id, tags, model_id=model_id, await_creation_for=0)
    while version.status == "PENDING_REGISTRATION":  # not by MLflow's own server
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        version = client.get_model_version(name, version.version)
    return version


def _version_of_run(client: MlflowClient, name: str, run_id: str, digest: str) -> ModelVersion | None:
    for version in _versions(client, name):
        if version.run_id == run_id and version.tags.get(DIGEST_TAG) == digest and version.status == "READY":
            return version
    return None


def _contend(client: MlflowClient, name: str, version: ModelVersion) -> None:
    """Give `best` to the version if it is more accurate than the holder; see the module's docstring."""
    contender = version
    while True:
        settled = {turn for turn in _turns(client, name) if turn.startswith(_TAKEN)}
        holder = _holder(client, name)
        if holder is not None and _accuracy(holder) >= _accuracy(contender):
            return
        turn = uuid.uuid4().hex
        client.set_model_version_tag(name, contender.version, _TURN_TAG, _TAKING + turn)
        client.set_registered_model_alias(name, BEST, contender.version)
        client.set_model_version_tag(name, contender.version, _TURN_TAG, _TAKEN + turn)
        overwritten = [each for turn, each in _turns(client, name).items() if turn not in settled]
        contender = max([contender, *overwritten], key=lambda each: (_accuracy(each), -_number(each)))


def _turns(client: MlflowClient, name: str) -> dict[str, ModelVersion]:
    """The versions that took `best` by the rule or are about to, by the value each said it with."""
    return {each.tags[_TURN_TAG]: each for each in _versions(client, name) if _TURN_TAG in each.tags}


def _fetch(client: MlflowClient, tracking_uri: str, version: ModelVersion, folder: Path) -> Path:
    """Download a version's checkpoint directory into `folder`."""
    at = client.get_model_version_download_uri(version.name, version.version)

    def fetch(path: str) -> str:
        return mlflow.artifacts.download_artifacts(f"{at}/{path}", dst_path=str(folder), tracking_uri=tracking_uri)

    description = Model.load(fetch("MLmodel"))
    return Path(fetch(description.flavors[mlflow.pyfunc.FLAVOR_NAME][mlflow.pyfunc.DATA]))


def _resolve(client: MlflowClient, reference: str) -> ModelVersion:
    name, alias, number = _parse_reference(reference)
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    names = _names(client)
    if name not in names:
        known = f"registered are {', '.join(names)}" if names else "none is; `tavlad train` registers one"
        raise TrackingError(f"there is no registered model {name!r}: {known}")
    numbers = ", ".join(str(_number(version)) for version in sorted(_versions(client, name), key=_number))
    wanted = f"version @{alias}" if alias is not None else f"version {number}"
    raise TrackingError(f"registered model {name} has no {wanted}: it has versions {numbers or '(none)'}")


def _parse_reference(reference: str) -> tuple[str, str | None, str]:
    """(name, alias or None, version number)."""
    text = reference.removeprefix("models:/").strip("/")
    name, at, alias = text.partition("@")
    if at and name and alias:
        return name, alias, ""
    name, _, number = text.rpartition("/")
    if name and number.isdigit():
        return name, None, number
    raise ValueError(f"{reference!r} names no registered model: write NAME@best or NAME/VERSION")


def _names(client: MlflowClient) -> list[str]:
    names: list[str] = []
    page = client.search_registered_models(order_by=["name ASC"])
    names += [model.name for model in page]
    while page.token:
        page = client.search_registered_models(order_by=["name ASC"], page_token=page.token)
        names += [model.name for model in page]
    return names


def _versions(client: MlflowClient, name: str) -> Sequence[ModelVersion]:
    versions: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=_VERSIONS_PER_PAGE, page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def _holder(client: MlflowClient, name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, BEST)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _accuracy(version: ModelVersion) -> float:
    """Of a version; minus infinity for one that was registered by other means and does not say."""
    try:
        accuracy = float(version.tags.get(ACCURACY_TAG, "nan"))
    except ValueError:
        return -math.inf
    return -math.inf if math.isnan(accuracy) else accuracy


def _number(version: ModelVersion) -> int:
    return int(version.version)


@contextlib.contextmanager
def _said_clearly(tracking_uri: str) -> Generator[None]:
    """Errors of the server as one sentence."""
    require_answer(tracking_uri)
    try:
        yield
    except MlflowException as error:
        reason = without_user(" ".join(str(error).split()))[:500]
        raise TrackingError(f"MLflow at {without_user(tracking_uri)} failed: {reason}") from error
