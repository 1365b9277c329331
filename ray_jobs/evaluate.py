"""tavlad evaluate: a model's scores on one part of a set's split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import ray
import torch

from infra.site import Site, load_site
from ray_jobs.cluster import connect, result_of
from ray_jobs.console import Console
from ray_jobs.models import fetch_model
from ray_jobs.plan import locate_set
from shards.index import load_index
from shards.read import ClipLoader, LoaderOptions
from shards.scratch import scratch
from shards.store import open_store
from tavlad.checkpoint import load_model
from tavlad.errors import UserError
from tavlad.evaluate import evaluate
from tavlad.metrics import Scores, fuse

_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A model's scores and the names of its actions, in label order."""

    scores: Scores
    actions: tuple[str, ...]


def evaluate_model(
    site: Site, model: str, dataset: str, split: int, part: Literal["train", "test"], console: Console
) -> Evaluation:
    """The scores of a model (a registered one such as "NAME@best", or a directory) by a Ray task."""
    connect(site, console.say)
    console.heading(f"Evaluating {model} on the {part} part of {dataset}, split {split}")
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = _evaluate.options(num_gpus=num_gpus)
    return result_of(task.remote(site.name, model, dataset, split, part))


def fuse_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """What several models say together of the same clips, each in its own set of them: see `fuse`."""
    return Evaluation(scores=fuse([each.scores for each in evaluations]), actions=evaluations[0].actions)


@ray.remote(num_cpus=1, max_calls=1)  # its process ends, and gives the model's memory back
def _evaluate(site_name: str, name: str, dataset: str, split: int, part: Literal["train", "test"]) -> Evaluation:
    site = load_site(site_name)
    with scratch() as folder:
        model, card = load_model(fetch_model(site.mlflow_uri, name, folder / "model"))
    store = open_store(locate_set(site, dataset), site.s3)
    index = load_index(store)
    known = (card.actions, card.num_frames, card.model.modality)
    if (index.actions, index.num_frames, index.modality) != known:
        raise UserError(
            f"{name} tells {len(card.actions)} actions apart in clips of {card.num_frames} frames "
            f"({card.model.modality}), and {store.uri} has {len(index.actions)} actions in clips of {index.num_frames} "
            f"({index.modality}): evaluate it on a set like the one it knows"
        )
    options = LoaderOptions(batch_size=_BATCH_SIZE, seed=0, crop=card.crop, augment=False, shuffle=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = ClipLoader(index, store, split, part, options)
    scores = evaluate(model.to(device), loader.epoch(0), card.precision)
    return Evaluation(scores=scores, actions=card.actions)
