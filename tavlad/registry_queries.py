"""Questions to MLflow's registry that all of its users share, and its errors as one sentence."""

import contextlib
import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tavlad.errors import UserError
from tavlad.runlog import TrackingError
from tavlad.spool import without_user
from tavlad.tracking import require_answer

BEST = "best"
"""The alias of the version with the highest accuracy on the test part."""
ACCURACY_TAG = "test_top1"
DIGEST_TAG = "sha256"
"""Tag of a version: digest of its checkpoint directory."""
OWN_TAGS = "tavlad."
"""How the tags begin that only the moving of `best` reads."""

_FILES = (".safetensors", ".json")
_VERSIONS_PER_PAGE = 200


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


def registered_models(tracking_uri: str, name: str | None = None) -> list[RegisteredVersion]:
    """Every version of every registered model, or of the one named, by name, newest first.

    TrackingError when no model has that name.
    """
    rows: list[RegisteredVersion] = []
    with said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        names = names_of_models(client)
        if name is not None and name not in names:
            raise no_such_model(name, names)
        for each in names if name is None else [name]:
            best = holder_of_best(client, each)
            rows += [
                RegisteredVersion(
                    name=each,
                    version=number_of(version),
                    run_id=version.run_id or "",
                    is_best=best is not None and number_of(best) == number_of(version),
                    created=version.creation_timestamp or 0,
                    tags={key: value for key, value in version.tags.items() if not key.startswith(OWN_TAGS)},
                )
                for version in sorted(versions_of(client, each), key=number_of, reverse=True)
            ]
    return rows


def resolve(client: MlflowClient, reference: str) -> ModelVersion:
    """The version of "NAME@best", "NAME/3" or the same after "models:/"; TrackingError says what there is instead."""
    name, alias, number = _parse_reference(reference)
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    names = names_of_models(client)
    if name not in names:
        raise no_such_model(name, names)
    numbers = ", ".join(str(number_of(version)) for version in sorted(versions_of(client, name), key=number_of))
    wanted = f"version @{alias}" if alias is not None else f"version {number}"
    raise TrackingError(f"registered model {name} has no {wanted}: it has versions {numbers or '(none)'}")


def pinned(tracking_uri: str, reference: str) -> str:
    """The version that a reference means now, as "NAME/3", whatever it will mean later."""
    with said_clearly(tracking_uri):
        version = resolve(MlflowClient(tracking_uri), reference)
        return f"{version.name}/{number_of(version)}"


def no_such_model(name: str, names: Sequence[str]) -> TrackingError:
    """The error that says which models there are."""
    known = f"registered are {', '.join(names)}" if names else "none is; `tavlad train` registers one"
    return TrackingError(f"there is no registered model {name!r}: {known}")


def _parse_reference(reference: str) -> tuple[str, str | None, str]:
    """(name, alias or None, version number)."""
    text = reference.removeprefix("models:/").strip("/")
    name, at, alias = text.partition("@")
    if at and name and alias:
        return name, alias, ""
    name, _, number = text.rpartition("/")
    if name and number.isdigit():
        return name, None, number
    raise UserError(f"{reference!r} names no registered model: write NAME@best or NAME/VERSION")


def names_of_models(client: MlflowClient) -> list[str]:
    """Names of all registered models, sorted."""
    page = client.search_registered_models(order_by=["name ASC"])
    names = [model.name for model in page]
    while page.token:
        page = client.search_registered_models(order_by=["name ASC"], page_token=page.token)
        names += [model.name for model in page]
    return names


def versions_of(client: MlflowClient, name: str) -> Sequence[ModelVersion]:
    """All versions of a model."""
    versions: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=_VERSIONS_PER_PAGE, page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def holder_of_best(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that has the alias `best`."""
    try:
        return client.get_model_version_by_alias(name, BEST)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def accuracy_of(version: ModelVersion) -> float:
    """Of a version; minus infinity for one that was registered by other means and does not say."""
    try:
        accuracy = float(version.tags.get(ACCURACY_TAG, "nan"))
    except ValueError:
        return -math.inf
    return -math.inf if math.isnan(accuracy) else accuracy


def number_of(version: ModelVersion) -> int:
    """The version's number."""
    return int(version.version)


def digest_of(directory: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint directory's weights and card."""
    digest = hashlib.sha256()
    for path in model_files(directory):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def model_files(directory: Path) -> list[Path]:
    """What travels: weights and JSON. Training states, which are pickles, never do."""
    return sorted(path for path in directory.iterdir() if path.suffix in _FILES)


@contextlib.contextmanager
def said_clearly(tracking_uri: str) -> Generator[None]:
    """Errors of the server as one sentence."""
    require_answer(tracking_uri)
    try:
        yield
    except MlflowException as error:
        reason = without_user(" ".join(str(error).split()))[:500]
        raise TrackingError(f"MLflow at {without_user(tracking_uri)} failed: {reason}") from error
