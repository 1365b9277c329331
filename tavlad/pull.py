"""Fetch a registered model: what is there already is not fetched again, and what arrives is checked by its digest."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request

from tavlad.errors import UserError
from tavlad.registry_queries import DIGEST_TAG, digest_of, resolve, said_clearly
from tavlad.runlog import TrackingError

_BYTES_AT_ONCE = 1 << 20
_SECONDS_FOR_BYTES = 60.0

OnBytes = Callable[[int, int], None]
"""Told how many bytes are here, of how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """A model that was fetched."""

    directory: Path
    name: str
    version: int
    digest: str
    """SHA-256 of its checkpoint directory."""


def pull(tracking_uri: str, reference: str, directory: Path, on_bytes: OnBytes | None = None) -> Pulled:
    """Fetch the checkpoint directory of "NAME@best", "NAME/3" or the same after "models:/" into `directory`, whole.

    `directory` must be empty or absent, or hold that very model already. A pull that was cut goes on where it was, from
    the hidden folder beside it. TrackingError for what is not there, damaged, or cut on its way.
    """
    with said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        version = resolve(client, reference)
        digest = version.tags.get(DIGEST_TAG)
        if directory.is_dir() and any(directory.iterdir()):
            if digest != digest_of(directory):
                raise UserError(f"{directory} is not empty: name a new folder for {reference}")
        else:
            digest = _fetch(client, tracking_uri, version, directory, on_bytes or (lambda _done, _total: None))
    assert digest is not None
    return Pulled(directory=directory, name=version.name, version=int(version.version), digest=digest)


def _fetch(client: MlflowClient, tracking_uri: str, version: ModelVersion, directory: Path, on_bytes: OnBytes) -> str:
    expected = version.tags.get(DIGEST_TAG)
    partial = directory.with_name(f".{directory.name}.{(expected or f'version{version.version}')[:12]}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    at = client.get_model_version_download_uri(version.name, version.version)
    source = _Source(get_artifact_repository(at, tracking_uri=tracking_uri))
    try:
        source.fetch_checkpoint(partial, on_bytes)
    except (OSError, requests.RequestException) as error:
        where = f"{version.name}/{version.version}"
        raise TrackingError(f"fetching {where} was cut ({error}): run it again, it goes on where it was") from error
    found = digest_of(partial)
    if expected is not None and found != expected:
        shutil.rmtree(partial)
        reference = f"{version.name}/{version.version}"
        raise TrackingError(f"{reference} was damaged on its way or in the artifact store: fetch it again")
    if directory.is_dir():
        directory.rmdir()
    partial.rename(directory)
    return found


class _Source:
    """Where the files of one version are."""

    def __init__(self, repository: ArtifactRepository) -> None:
        self._repository = repository

    def fetch_checkpoint(self, folder: Path, on_bytes: OnBytes) -> None:
        """The version's weights and card into `folder`, as far as they are not there."""
        at = Model.load(self._repository.download_artifacts("MLmodel")).flavors["python_function"]["data"]
        files = {Path(each.path).name: each for each in self._repository.list_artifacts(at) if not each.is_dir}
        total = sum(each.file_size or 0 for each in files.values())
        done = 0
        for name, each in sorted(files.items()):
            place, size = folder / name, each.file_size or 0
            present = place.stat().st_size if place.exists() else 0
            if present > size:
                place.unlink()
                present = 0
            if present < size:
                self._fetch_rest(each.path, place, present, lambda here, before=done: on_bytes(before + here, total))
            done += size
            on_bytes(done, total)

    def _fetch_rest(self, path: str, place: Path, present: int, on_bytes: Callable[[int], None]) -> None:
        """Bytes of a file from `present` on, appended to what is there."""
        address = self._repository.artifact_uri
        if not address.startswith(("http://", "https://")):  # a store that MLflow reads without its server
            self._repository.download_artifacts(path, str(place.parent))
            fetched = place.parent / path
            if fetched != place:
                fetched.replace(place)
                shutil.rmtree(place.parent / Path(path).parts[0])
            return
        answer = http_request(
            get_default_host_creds(address),
            f"/{path}",
            "GET",
            timeout=_SECONDS_FOR_BYTES,
            stream=True,
            extra_headers={"Range": f"bytes={present}-"} if present else {},
        )
        assert answer is not None
        augmented_raise_for_status(answer)
        is_rest = answer.status_code == requests.codes["partial_content"]
        with answer, place.open("ab" if is_rest else "wb") as file:
            for chunk in answer.iter_content(_BYTES_AT_ONCE):
                file.write(chunk)
                on_bytes(file.tell())
