"""What a training is, before any of it runs: its recipe, its set, its split, and the name that follows from them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.site import Site, cache_folder
from ray_jobs.checkpoints import Checkpoints
from ray_jobs.provenance import Codes, OtherCode, codes_of, first_that_exists, name_in_use, provenance_codes
from ray_jobs.recipe import Recipe, is_place
from shards.disk_cache import DiskCache
from shards.index import Index, load_index, share_of
from shards.store import Store, open_store
from tavlad.checkpoint import CARD
from tavlad.config import StageConfig
from tavlad.errors import UserError

CODES = "code.json"
"""Beside what is kept without a model's card, that of TDD and of sweeps: the code that made it."""

_RESULT_FORMAT = 2  # raise it when the same recipe would no longer compute the same


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """One training of one split. The same recipe, set and split give the same name: that is how it is resumed."""

    site_name: str
    recipe: Recipe
    split: int
    dataset_uri: str
    dataset_name: str
    dataset_fingerprint: str
    name: str
    """Such as "demo-split1-ta-vlad-1a2b3c4d5e"."""
    uri: str
    """Where its checkpoints are."""

    @property
    def stages(self) -> list[tuple[Literal[1, 2], StageConfig]]:
        """The stages that have epochs, by number."""
        stages: list[tuple[Literal[1, 2], StageConfig]] = [(1, self.recipe.stage1), (2, self.recipe.stage2)]
        return [(number, stage) for number, stage in stages if stage.epochs > 0]

    @property
    def last_checkpoint(self) -> str:
        """Name of the checkpoint that ends the training."""
        number, stage = self.stages[-1]
        return checkpoint_name(number, stage.epochs)

    def checkpoints(self, site: Site) -> Checkpoints:
        """The store of its checkpoints."""
        store = open_store(f"{self.uri}/checkpoints", site.s3)
        return Checkpoints(store, keep=self.recipe.resources.keep_checkpoints)

    def codes(self, site: Site) -> Codes:
        """The code that trained it as far as it is; none if nothing is kept of it yet."""
        return _codes_in(open_store(self.uri, site.s3))


def read_uri(site: Site, uri: str) -> bytes:
    """The object at an s3:// URI or a path."""
    folder, _, name = uri.rpartition("/")
    return open_store(folder, site.s3).read(name)


def digest_of_weights(site: Site, recipe: Recipe) -> str:
    """What a file of trunk weights holds: a file that changed under its name makes another training, and so does a
    trunk whose maps have changed."""
    source = recipe.model.weights
    digest = source if source in ("imagenet", "none") else hashlib.sha256(read_uri(site, source)).hexdigest()
    return digest + "".join(f" {name} {value}" for name, value in recipe.model.trunk_facts.items())


def locate_set(site: Site, dataset: str) -> str:
    """The URI of a packed set given by name, s3:// URI or folder."""
    return absolute(dataset) if is_place(dataset) else site.dataset_uri(dataset)


def absolute(place: str) -> str:
    """The URI or folder as workers understand it, who run in folders of their own."""
    return place if "://" in place else str(Path(place).absolute())


def open_set(site: Site, dataset: str, recipe: Recipe) -> tuple[Store, Index]:
    """The set a recipe trains on, or the share of it that the recipe rehearses with; ValueError for a set of another
    modality than the recipe's."""
    store = open_store(locate_set(site, dataset), site.s3)
    index = load_index(store)
    if index.modality != recipe.model.modality:
        raise UserError(
            f"{index.name!r} is a set of {index.modality} and model.modality is {recipe.model.modality!r}: add "
            f"--set model.modality={index.modality}, or choose a set packed with --modality {recipe.model.modality}"
        )
    return store, share_of(index, recipe.training.subset)


def node_cache(site: Site, gigabytes: float, index: Index) -> DiskCache | None:
    """This node's cache of the set's packed clips and features; none if it may take 0 GB."""
    if not gigabytes:
        return None
    return DiskCache(folder=cache_folder(site), max_bytes=int(gigabytes * 1e9), set_name=index.fingerprint)


def checkpoint_name(stage: int, epochs_done: int, steps_done: int = 0) -> str:
    """The checkpoint after so many epochs, and steps of the next one; names sort in the order of training."""
    return f"stage{stage}-epoch{epochs_done:05d}" + (f"-step{steps_done:06d}" if steps_done else "")


def plan_training(
    site: Site, recipe: Recipe, split: int, other_code: OtherCode = "refuse"
) -> tuple[TrainingPlan, Index]:
    """Check the recipe against the set and name the training. Raises ValueError for what cannot be trained."""
    recipe.model.require_network()
    if recipe.stage1.epochs + recipe.stage2.epochs == 0:
        raise UserError("stage1.epochs and stage2.epochs are both 0: give at least one stage an epoch")
    return plan_run(site, recipe, split, other_code)


def plan_run(site: Site, recipe: Recipe, split: int, other_code: OtherCode = "refuse") -> tuple[TrainingPlan, Index]:
    """`plan_training` of anything that a recipe names, a network or not."""
    dataset_uri = locate_set(site, recipe.dataset)
    _, index = open_set(site, recipe.dataset, recipe)
    for part in ("train", "test"):
        index.clips(split, part)  # refuses a part without clips
    facts = {"set": index.fingerprint, "weights": digest_of_weights(site, recipe)}
    numbers = {"split": split, "format": _RESULT_FORMAT}
    names = [
        digits and f"{index.name}-split{split}-{recipe.model.variant}-{digits[:10]}"
        for digits in (recipe.fingerprint(**facts, **numbers), recipe.first_fingerprint(**facts, **numbers))
    ]
    runs = open_store(site.runs_uri, site.s3)
    name = name_in_use(runs, first_that_exists(runs, names), lambda each: _codes_in(runs.child(each)), other_code)
    plan = TrainingPlan(
        site_name=site.name,
        recipe=recipe,
        split=split,
        dataset_uri=dataset_uri,
        dataset_name=index.name,
        dataset_fingerprint=index.fingerprint,
        name=name,
        uri=f"{site.runs_uri}/{name}",
    )
    return plan, index


def _codes_in(run: Store) -> Codes:
    """The code that made what a run's folder keeps."""
    checkpoints = Checkpoints(run.child("checkpoints"))
    if names := checkpoints.names():
        return provenance_codes(json.loads(checkpoints.read(names[-1], CARD))["provenance"])
    if not run.list("tdd/"):
        return ()
    return codes_of(json.loads(run.read(CODES)) if run.exists(CODES) else None)
