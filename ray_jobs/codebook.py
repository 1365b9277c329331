"""tavlad codebook: the K visual words of a set's split, made once and found again by what they are."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import safetensors.torch
import torch

from infra.site import Site, load_site
from ray_jobs.cluster import connect, result_of
from ray_jobs.console import Console
from ray_jobs.plan import locate_set, node_cache, read_uri
from ray_jobs.recipe import Recipe
from shards.index import Index, load_index
from shards.read import ClipLoader, LoaderOptions
from shards.store import open_store
from tavlad.backbone import load_weights
from tavlad.codebook import find_centres, sample_descriptors
from tavlad.model import TaVlad

_CENTRES = "centres"


@dataclass(frozen=True, kw_only=True, slots=True)
class Codebook:
    """Where a codebook is, and the trunk weights it was made with."""

    uri: str
    trunk_weights: str
    """Provenance of the trunk's weights, with their SHA-256."""
    was_there: bool


def make_codebook(site: Site, recipe: Recipe, split: int, console: Console) -> Codebook:
    """The codebook of the recipe's set and split; made by a Ray task if there is none yet."""
    connect(site)
    console.heading(f"Codebook: {recipe.model.num_clusters} clusters of {recipe.dataset}, split {split}")
    task = _make_codebook.options(num_cpus=1, num_gpus=min(1.0, recipe.resources.gpus_per_worker))
    codebook: Codebook = result_of(task.remote(site.name, recipe, split))
    console.say(f"  {'found' if codebook.was_there else 'made'}: {codebook.uri}")
    return codebook


def load_codebook(uri: str, site: Site) -> torch.Tensor:
    """The centres (K, D) of a codebook."""
    return safetensors.torch.load(read_uri(site, uri))[_CENTRES]


def build_untrained(site: Site, recipe: Recipe, num_actions: int) -> tuple[TaVlad, str]:
    """The recipe's model with its trunk's weights, before any codebook; and the provenance of these weights."""

    torch.manual_seed(recipe.training.seed)
    model = TaVlad(recipe.model, num_actions)
    provenance = load_weights(model.trunk, recipe.model.trunk, recipe.model.weights, partial(read_uri, site))
    if model.attention_trunk is not None:
        model.attention_trunk.load_state_dict(model.trunk.state_dict())
    return model, provenance


@ray.remote(max_calls=1)  # its process ends, and gives the memory of the model and of k-means back
def _make_codebook(site_name: str, recipe: Recipe, split: int) -> Codebook:
    site = load_site(site_name)
    store = open_store(locate_set(site, recipe.dataset), site.s3)
    index = load_index(store)
    model, provenance = build_untrained(site, recipe, len(index.actions))
    name = f"{_fingerprint(recipe, split, index, provenance)}.safetensors"
    codebooks = open_store(site.codebooks_uri, site.s3)
    uri = f"{site.codebooks_uri}/{name}"
    if codebooks.exists(name):
        return Codebook(uri=uri, trunk_weights=provenance, was_there=True)
    centres_KD = _cluster(site, model, recipe, split, index)
    # Two at once make the same bytes; whichever is first is kept.
    codebooks.write_if_absent(name, safetensors.torch.save({_CENTRES: centres_KD}))
    return Codebook(uri=uri, trunk_weights=provenance, was_there=False)


def _cluster(site: Site, model: TaVlad, recipe: Recipe, split: int, index: Index) -> torch.Tensor:
    store = open_store(locate_set(site, recipe.dataset), site.s3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = LoaderOptions(
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        crop=recipe.training.crop,
        augment=False,
        shuffle=True,
        num_threads=recipe.resources.loader_threads,
    )
    cache = node_cache(site, recipe.resources.disk_cache, index)
    loader = ClipLoader(index, store, split, "train", options, cache=cache)
    descriptors = sample_descriptors(
        model.to(device), loader.epoch(0), recipe.codebook, recipe.training.seed, recipe.training.precision
    )
    return find_centres(descriptors, recipe.model.num_clusters, recipe.training.seed)


def _fingerprint(recipe: Recipe, split: int, index: Index, provenance: str) -> str:
    facts: dict[str, Any] = {
        "set": index.fingerprint,
        "split": split,
        "trunk": provenance,
        "descriptor": recipe.model.descriptor,
        "clusters": recipe.model.num_clusters,
        "frames": recipe.codebook.frames,
        "frames_per_video": recipe.codebook.frames_per_video,
        "crop": recipe.training.crop,
        "precision": recipe.training.precision,
        "seed": recipe.training.seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
