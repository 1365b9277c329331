"""tavlad codebook: the K visual words of a set's split, made once and found again by what they are."""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import safetensors.torch
import torch

from infra.site import Site, load_site
from ray_jobs.cluster import connect, require_room, result_of
from ray_jobs.console import Console
from ray_jobs.plan import node_cache, open_set, read_uri
from ray_jobs.recipe import Recipe
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.store import Store, open_store
from tavlad.backbone import load_weights
from tavlad.codebook import descriptors_of, learn_words, sample_maps
from tavlad.model import TaVlad
from tavlad.vlad import Pca, VisualWords

_CENTRES, _PCA_MEAN, _PCA_COMPONENTS = "centres", "pca.mean", "pca.components"


@dataclass(frozen=True, kw_only=True, slots=True)
class Codebook:
    """Where a codebook is, and the trunk weights it was made with."""

    uri: str
    """Empty for a model without VLAD, which needs none."""
    trunk_weights: str
    """Provenance of the trunk's weights, with their SHA-256."""
    was_there: bool


def make_codebook(site: Site, recipe: Recipe, split: int, console: Console) -> Codebook:
    """The codebook of the recipe's set and split; made by a Ray task if there is none yet."""
    connect(site, console.say)
    asked = {"CPU": 1.0, "GPU": min(1.0, recipe.resources.gpus_per_worker)}
    require_room(site, asked)
    if not recipe.model.has_vlad:
        console.heading(f"Trunk weights of {recipe.dataset} (no VLAD, so no codebook)")
    else:
        console.heading(f"Codebook: {recipe.model.num_clusters} clusters of {recipe.dataset}, split {split}")
    task = _make_codebook.options(num_cpus=asked["CPU"], num_gpus=asked["GPU"])
    codebook: Codebook = result_of(task.remote(site.name, recipe, split))
    if codebook.uri:
        console.say(f"  {'found' if codebook.was_there else 'made'}: {codebook.uri}")
    return codebook


def load_codebook(uri: str, site: Site) -> VisualWords:
    """The centres of a codebook, and its PCA if it was learned behind one."""
    tensors = safetensors.torch.load(read_uri(site, uri))
    pca = None
    if _PCA_MEAN in tensors:
        pca = Pca(mean_D=tensors[_PCA_MEAN], components_PD=tensors[_PCA_COMPONENTS])
    return VisualWords(centres_KD=tensors[_CENTRES], pca=pca)


def _save_words(words: VisualWords) -> bytes:
    tensors = {_CENTRES: words.centres_KD}
    if words.pca is not None:
        tensors |= {_PCA_MEAN: words.pca.mean_D, _PCA_COMPONENTS: words.pca.components_PD}
    return safetensors.torch.save(tensors)


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
    store, index = open_set(site, recipe.dataset, recipe)
    model, provenance = build_untrained(site, recipe, len(index.actions))
    return codebook_of(site, recipe, split, index, store, model, provenance)


def codebook_of(
    site: Site, recipe: Recipe, split: int, index: Index, store: Store, model: TaVlad, provenance: str
) -> Codebook:
    """The codebook of the training part of an index; made here if there is none. `model` and `provenance` are
    `build_untrained`'s."""
    if model.vlad is None:
        return Codebook(uri="", trunk_weights=provenance, was_there=True)
    name = f"{_fingerprint(recipe, split, index, provenance)}.safetensors"
    codebooks = open_store(site.codebooks_uri, site.s3)
    uri = f"{site.codebooks_uri}/{name}"
    if codebooks.exists(name):
        return Codebook(uri=uri, trunk_weights=provenance, was_there=True)
    sample_name = f"samples/{_fingerprint(recipe, split, index, provenance, of_sample=True)}.npy"
    if codebooks.exists(sample_name):
        maps = np.load(io.BytesIO(codebooks.read(sample_name)), allow_pickle=False)
    else:
        maps = _sample(site, model, recipe, split, index, store)
        codebooks.write_if_absent(sample_name, _npy(maps))
    words = learn_words(descriptors_of(maps), recipe.model, recipe.training.seed)
    # Two at once make the same bytes; whichever is first is kept.
    codebooks.write_if_absent(name, _save_words(words))
    return Codebook(uri=uri, trunk_weights=provenance, was_there=False)


def _sample(
    site: Site, model: TaVlad, recipe: Recipe, split: int, index: Index, store: Store
) -> "np.ndarray[Any, Any]":
    """The trunk's maps of random frames, the same for every K: stored, so that a sweep asks the trunk once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = LoaderOptions(
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        crop=recipe.training.crop,
        augment=False,
        shuffle=True,
        num_threads=recipe.resources.unmeasured_threads,
    )
    cache = node_cache(site, recipe.resources.disk_cache, index)
    loader = ClipLoader(index, store, split, "train", options, cache=cache)
    training = recipe.training
    maps = sample_maps(model.to(device), loader.epoch(0), recipe.codebook, training.seed, training.precision)
    return maps.astype(recipe.features.dtype)


def _npy(values: "np.ndarray[Any, Any]") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _fingerprint(recipe: Recipe, split: int, index: Index, provenance: str, *, of_sample: bool = False) -> str:
    facts: dict[str, Any] = {
        "set": index.fingerprint,
        "split": split,
        "subset": recipe.training.subset,
        "trunk": provenance,
        "descriptor": recipe.model.descriptor,
        "clusters": 0 if of_sample else recipe.model.num_clusters,
        "pca": 0 if of_sample else recipe.model.descriptor_pca,
        "dtype": recipe.features.dtype,
        "frames": recipe.codebook.frames,
        "frames_per_video": recipe.codebook.frames_per_video,
        "crop": recipe.training.crop,
        "precision": recipe.trunk_precision,
        "seed": recipe.training.seed,
        **recipe.model.trunk_facts,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
