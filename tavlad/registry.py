"""Register a model: safetensors, JSON and source files, no pickle; visible only when all of it is stored."""

import contextlib
import hashlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from tavlad.promotion import CONTENDER, contend, is_to_contend
from tavlad.registry_queries import (
    ACCURACY_TAG,
    DIGEST_TAG,
    digest_of,
    holder_of_best,
    model_files,
    number_of,
    said_clearly,
    versions_of,
)
from tavlad.runlog import TrackingError
from tavlad.spool import without_credentials

with warnings.catch_warnings(action="ignore"):  # MLflow warns of type hints of its own
    import mlflow.pyfunc

CODE_TAG = "code_sha256"
"""Tag of a version: digest of the program that travels with it."""

_NAME_IN_RUN = "model"
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
    params: Mapping[str, int | bool]
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
    registering the same run and weights again finds it, and leaves `best` alone. TrackingError if the server does not
    answer or refuses.
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}: it must be a share from 0 to 1")
    with said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        digest = digest_of(model_directory)
        version = _version_of_run(client, name, run_id, digest)
        if version is None:
            model_id = _upload(client, model_directory, run_id, code)
            own_tags = {"run": run_id, ACCURACY_TAG: repr(accuracy)}
            own_tags |= {DIGEST_TAG: digest, CODE_TAG: _digest_of_code(code)} | CONTENDER
            version = _create_version(client, name, model_id, run_id, without_credentials(tags) | own_tags)
        previous = holder_of_best(client, name)
        if is_to_contend(version):
            contend(client, name, version)
        holder = holder_of_best(client, name)
        return Registered(
            name=name,
            version=number_of(version),
            is_best=holder is not None and number_of(holder) == number_of(version),
            previous_best=None if previous is None else number_of(previous),
        )


def _upload(client: MlflowClient, directory: Path, run_id: str, code: ServedCode) -> str:
    """Store the model's files under the run and return MLflow's id of them; READY only when all are there."""
    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name=_NAME_IN_RUN, source_run_id=run_id)
    with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
        data, packed = Path(folder) / "checkpoint", Path(folder) / "model"
        data.mkdir()
        for path in model_files(directory):
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


def _digest_of_code(code: ServedCode) -> str:
    """SHA-256 over the names and contents of the source files that travel with a model."""
    digest = hashlib.sha256()
    for folder in sorted(code.code_paths):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _signature(code: ServedCode) -> ModelSignature:
    """Columns out and settings in. Inputs are left open: no MLflow schema describes "paths, bytes or a uint8 array"."""
    return ModelSignature(
        outputs=Schema([ColSpec(kind, column) for column, kind in code.outputs]),
        params=ParamSchema(
            [
                ParamSpec(name, "boolean" if isinstance(default, bool) else "long", default)
                for name, default in code.params.items()
            ]
        ),
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
    for version in versions_of(client, name):
        if version.run_id == run_id and version.tags.get(DIGEST_TAG) == digest and version.status == "READY":
            return version
    return None
