"""Who holds the alias `best`: moved by rule to what is more accurate, by hand to what a person says, and back.

`best` is moved by a compare-and-set built from what MLflow has. A version that has taken the alias says so in a tag,
with a value of its own, and then looks for versions that took it since it read the old holder. If one of them is
better, that one was overwritten, and is put back. Of two that overwrite one another, the later to write its tag sees
the other's, so the last to write leaves the best of those registered at the same time. A process that dies on its way
leaves nothing behind that counts later.

Only a new version contends, once. It is created with a tag that says that this is still to come, so a registration
that was cut off and is repeated makes up for it. Who moves `best` by hand decides for all versions there are, and
clears that tag: a version put there by hand gives way only to a better one registered later.

A version that takes the alias remembers whom it followed, which is what a rollback goes back to.
"""

import uuid
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from tavlad.errors import UserError
from tavlad.registry_queries import (
    BEST,
    OWN_TAGS,
    accuracy_of,
    holder_of_best,
    names_of_models,
    no_such_model,
    number_of,
    resolve,
    said_clearly,
    versions_of,
)
from tavlad.runlog import TrackingError
from tavlad.spool import MAX_TAG_CHARACTERS, without_user

REASON_TAG = "best.reason"
"""Tag of a version that was made the best by hand: why."""

_TURN_TAG = f"{OWN_TAGS}best"
_FOLLOWED_TAG = f"{OWN_TAGS}best.followed"
"""The number of the version that held `best` before, empty for none."""
_TAKEN = "taken "
_CONTENDS_TAG = f"{OWN_TAGS}best.contends"
"""Of a version that has not yet contended to the end."""

CONTENDER = {_CONTENDS_TAG: "yes"}
"""Tags to create a version with that is to contend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What became of `best`."""

    name: str
    version: int
    """Its holder now."""
    previous: int | None
    """Its holder before."""
    reason: str


def is_to_contend(version: ModelVersion) -> bool:
    """Whether the version is new: it has not contended, and nobody has moved `best` by hand since it was created."""
    return _CONTENDS_TAG in version.tags


def contend(client: MlflowClient, name: str, version: ModelVersion) -> None:
    """Give `best` to the version if it is more accurate than the holder; see the module's docstring."""
    contender = version
    while True:
        settled = set(_turns(client, name))
        holder = holder_of_best(client, name)
        if holder is not None and accuracy_of(holder) >= accuracy_of(contender):
            _settle(client, version)
            return
        if contender is version:
            _follow(client, contender, holder)
        else:
            _take(client, contender)  # put back; it remembers whom it followed
        overwritten = [each for turn, each in _turns(client, name).items() if turn not in settled]
        contender = max([contender, *overwritten], key=lambda each: (accuracy_of(each), -number_of(each)))


def promote(tracking_uri: str, reference: str, reason: str) -> Moved:
    """Make a version ("NAME/3") the best whatever its accuracy; `reason` becomes its tag. TrackingError if absent."""
    reason = _checked(reason)
    with said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        version = resolve(client, reference)
        holder = holder_of_best(client, version.name)
        if holder is not None and number_of(holder) == number_of(version):
            raise TrackingError(f"version {version.version} of {version.name} is the best already: nothing to do")
        _settle(client, *versions_of(client, version.name))
        client.set_model_version_tag(version.name, version.version, REASON_TAG, reason)
        _follow(client, version, holder)
        return _moved(version, holder, reason)


def roll_back(tracking_uri: str, name: str, reason: str) -> Moved:
    """Give `best` back to the version that held it before the present one; repeated, it goes further back."""
    reason = _checked(reason)
    with said_clearly(tracking_uri):
        client = MlflowClient(tracking_uri)
        name = name.removeprefix("models:/").removesuffix(f"@{BEST}")
        holder = holder_of_best(client, name)
        if holder is None:
            names = names_of_models(client)
            raise no_such_model(name, names) if name not in names else TrackingError(f"{name} has no version @{BEST}")
        number = holder.tags.get(_FOLLOWED_TAG, "")
        versions = {str(number_of(each)): each for each in versions_of(client, name)}
        if number not in versions:
            followed = f"version {number}, which was deleted" if number else "no other version"
            raise TrackingError(
                f"version {holder.version} of {name} followed {followed}: name the version to go to, "
                f"`tavlad promote {name}/VERSION`"
            )
        version = versions[number]
        _settle(client, *versions.values())
        client.set_model_version_tag(name, number, REASON_TAG, reason)
        _take(client, version)  # whom it followed itself stays, so that the next rollback goes further back
        return _moved(version, holder, reason)


def _follow(client: MlflowClient, version: ModelVersion, holder: ModelVersion | None) -> None:
    """Take the alias from `holder`, and remember whom it was taken from."""
    if holder is not None:
        client.set_model_version_tag(version.name, version.version, _FOLLOWED_TAG, str(number_of(holder)))
    _take(client, version)


def _take(client: MlflowClient, version: ModelVersion) -> None:
    client.set_registered_model_alias(version.name, BEST, version.version)
    client.set_model_version_tag(version.name, version.version, _TURN_TAG, _TAKEN + uuid.uuid4().hex)


def _turns(client: MlflowClient, name: str) -> dict[str, ModelVersion]:
    """The versions that took `best`, by the value each said it with.

    Earlier code also told that it was about to, and left that behind where it died: such a value is void.
    """
    turns = {each.tags.get(_TURN_TAG, ""): each for each in versions_of(client, name)}
    return {turn: each for turn, each in turns.items() if turn.startswith(_TAKEN)}


def _settle(client: MlflowClient, *versions: ModelVersion) -> None:
    """These versions contend no more."""
    for version in filter(is_to_contend, versions):
        client.delete_model_version_tag(version.name, version.version, _CONTENDS_TAG)


def _checked(reason: str) -> str:
    reason = without_user(" ".join(reason.split()))
    if not reason:
        raise UserError("the reason is empty: say why, for those who find it later")
    if len(reason) > MAX_TAG_CHARACTERS:
        raise UserError(f"the reason has {len(reason)} characters: {MAX_TAG_CHARACTERS} fit")
    return reason


def _moved(version: ModelVersion, holder: ModelVersion | None, reason: str) -> Moved:
    previous = None if holder is None else number_of(holder)
    return Moved(name=version.name, version=number_of(version), previous=previous, reason=reason)
