"""TDD on one split of a set, by Ray tasks: sampled descriptors, a mixture of them, all clips' Fisher vectors, an SVM.

What a task makes lies beside the training's other files, whole, and is found again: an interrupted run goes on.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import Tensor

from infra.site import Site, load_site
from ray_jobs.cluster import connect, require_room, result_of
from ray_jobs.console import Console
from ray_jobs.plan import CODES, TrainingPlan, node_cache, open_set, plan_run, read_uri
from ray_jobs.provenance import OtherCode, recorded, with_this_code
from ray_jobs.recipe import Recipe
from ray_jobs.register import log_results
from ray_jobs.run_records import SECONDS_FOR_DELIVERY, RunRecords
from ray_jobs.tasks import Progress, run_tasks
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.scratch import scratch
from shards.store import Store, open_store
from shards.trajectories import trajectories
from tavlad.backbone import build_trunk, load_weights
from tavlad.errors import UserError
from tavlad.fisher import Mixture, classify, fisher_vector, learn_mixture
from tavlad.frozen import FrozenTrunk
from tavlad.metrics import Scores
from tavlad.parallel import autocast
from tavlad.trajectory_pooling import normalised_maps, pool_along

Part = Literal["train", "test"]
_CLIPS_A_TASK = 128
_DESCRIPTORS = 128_000  # that the mixtures are learned from
_SVM_COST = 100.0  # TDD, section 4.1


@dataclass(frozen=True, kw_only=True, slots=True)
class TddRun:
    """What TDD came to on the test part of a split."""

    plan: TrainingPlan
    scores: Scores
    """Of the SVM: its "probabilities" are the softmax of its decision values, which keeps their order."""
    run_url: str


def run_tdd(site: Site, recipe: Recipe, split: int, console: Console, other_code: OtherCode = "refuse") -> TddRun:
    """Compute what is missing and classify the test clips. ValueError for a set or a recipe that does not fit."""
    plan, index = plan_run(site, recipe, split, other_code)
    codes = with_this_code(plan.name, plan.codes(site), other_code)
    connect(site, console.say)
    gpus = min(1.0, recipe.resources.gpus_per_worker)
    require_room(site, {"CPU": 1.0, "GPU": gpus})
    open_store(plan.uri, site.s3).write(CODES, json.dumps(recorded(codes)).encode())
    console.heading(f"TDD {plan.name}")
    store = _kept(site, plan)
    with RunRecords(site, plan, index, codes) as records:
        num_clips = {part: len(index.clips(split, part)) for part in ("train", "test")}
        sampling = _sample.options(num_gpus=gpus)
        calls = [(site.name, plan, first) for first in range(0, num_clips["train"], _CLIPS_A_TASK)]
        missing = [] if store.exists("mixture0.npz") else calls
        run_tasks(sampling, missing, "clips sampled", num_clips["train"], console)
        result_of(_learn.remote(site.name, plan, len(calls)))
        encoding = _encode.options(num_gpus=gpus)
        calls = [
            (site.name, plan, part, first)
            for part, count in num_clips.items()
            for first in range(0, count, _CLIPS_A_TASK)
        ]
        run_tasks(encoding, calls, "clips encoded", sum(num_clips.values()), console)
        scores, train_top1 = result_of(_classify.remote(site.name, plan))
        row = {"stage": 1, "epoch": 1, "train/top1": train_top1, **scores.summary("test")}
        records.parent.log_metrics({name: row[name] for name in row if "/" in name}, step=1)
        with scratch() as folder:
            log_results(site, plan, index, records, scores, [row], folder)
        records.parent.run_id(SECONDS_FOR_DELIVERY)
        records.finish()
        console.say(f"  test top-1 {scores.top(1):.1%}; compare: {records.comparison_url()}")
        return TddRun(plan=plan, scores=scores, run_url=records.parent.url())


class _Clips:
    """Reads clips of one part and describes them: the trunk's maps along their trajectories."""

    def __init__(self, site: Site, plan: TrainingPlan, part: Part) -> None:
        recipe = plan.recipe
        self.store, index = open_set(site, recipe.dataset, recipe)
        options = LoaderOptions(batch_size=1, seed=0, crop=recipe.training.crop, augment=False, shuffle=False)
        cache = node_cache(site, recipe.resources.disk_cache, index)
        self.loader = ClipLoader(index, self.store, plan.split, part, options, cache=cache)
        torch.manual_seed(recipe.training.seed)
        trunk = build_trunk(recipe.model.trunk)
        load_weights(trunk, recipe.model.trunk, recipe.model.weights, partial(read_uri, site))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trunk = FrozenTrunk(trunk.to(self._device))
        self._precision = recipe.training.precision

    def rows(self, first: int) -> range:
        """The rows of the task that begins there."""
        return range(first, min(first + _CLIPS_A_TASK, self.loader.num_clips))

    def described(self, row: int) -> list["np.ndarray[Any, Any]"]:
        """(P, D) of each way to normalise the map."""
        frames_TCHW = self.loader.read_view(row, None)
        tracks_PL3 = trajectories(frames_TCHW.permute(0, 2, 3, 1).numpy())
        with autocast(self._device, self._precision):
            maps = self._trunk.maps(frames_TCHW.to(self._device), len(frames_TCHW))
        post_relu: Tensor = maps.post_relu_BDHW.float().cpu()
        return [pool_along(maps_TDHW, tracks_PL3) for maps_TDHW in normalised_maps(post_relu)]


@ray.remote(num_cpus=1, max_calls=1)  # its process ends, and gives the trunk's memory back
def _sample(site_name: str, plan: TrainingPlan, first: int, progress: Progress) -> None:
    """Random descriptors of some training clips, as many of each clip."""
    site = load_site(site_name)
    store, name = _kept(site, plan), f"sample{first:07d}.npz"
    if store.exists(name):
        return
    clips = _Clips(site, plan, "train")
    most = max(1, _DESCRIPTORS // clips.loader.num_clips)
    found: list[list[Any]] = []
    for done, row in enumerate(clips.rows(first), start=1):
        ways = clips.described(row)
        generator = np.random.default_rng((plan.recipe.training.seed, row))
        chosen = generator.permutation(len(ways[0]))[:most]
        found.append([way[chosen] for way in ways])
        progress(done)
    _write(store, name, **{f"way{way}": np.concatenate(parts) for way, parts in enumerate(zip(*found, strict=True))})


@ray.remote(num_cpus=1, max_calls=1)
def _learn(site_name: str, plan: TrainingPlan, num_samples: int) -> None:
    """A PCA and a mixture for each way to normalise the map."""
    store = _kept(load_site(site_name), plan)
    model, seed = plan.recipe.model, plan.recipe.training.seed
    if model.descriptor_pca < 1:
        raise UserError('model.descriptor_pca = 0: "tdd" needs a PCA, such as model.descriptor_pca = 64')
    for way in range(2):
        if store.exists(f"mixture{way}.npz"):
            continue
        samples = [
            np.load(io.BytesIO(store.read(f"sample{number * _CLIPS_A_TASK:07d}.npz")))[f"way{way}"]
            for number in range(num_samples)
        ]
        mixture = learn_mixture(np.concatenate(samples), model.descriptor_pca, model.num_clusters, seed)
        _write(store, f"mixture{way}.npz", **{name: getattr(mixture, name) for name in Mixture.__slots__})


@ray.remote(num_cpus=1, max_calls=1)
def _encode(site_name: str, plan: TrainingPlan, part: Part, first: int, progress: Progress) -> None:
    """The Fisher vectors of some clips, both ways beside each other."""
    site = load_site(site_name)
    store, name = _kept(site, plan), f"{part}{first:07d}.npz"
    if store.exists(name):
        return
    mixtures = [Mixture(**np.load(io.BytesIO(store.read(f"mixture{way}.npz")))) for way in range(2)]
    clips = _Clips(site, plan, part)
    rows: list[Any] = []
    for done, row in enumerate(clips.rows(first), start=1):
        ways = zip(clips.described(row), mixtures, strict=True)
        rows.append(np.concatenate([fisher_vector(x_PD, mixture) for x_PD, mixture in ways]))
        progress(done)
    _write(store, name, vectors=np.stack(rows))


@ray.remote(num_cpus=1, max_calls=1)
def _classify(site_name: str, plan: TrainingPlan) -> tuple[Scores, float]:
    """The SVM's scores of the test part, and its share of right training clips."""
    site = load_site(site_name)
    store = _kept(site, plan)
    _, index = open_set(site, plan.recipe.dataset, plan.recipe)
    train, test = (index.clips(plan.split, part) for part in ("train", "test"))
    learned, asked = (np.concatenate(list(_vectors(store, part, index, plan))) for part in ("train", "test"))
    both = np.concatenate([asked, learned])
    seed = plan.recipe.training.seed
    values = classify(learned, train.labels_N, both, len(index.actions), _SVM_COST, seed)
    probabilities = torch.from_numpy(values).softmax(dim=1).numpy()
    order = np.argsort(test.keys(), kind="stable")  # as every evaluation
    scores = Scores(
        keys=tuple(test.key(int(row)) for row in order),
        labels=test.labels_N[order],
        probabilities=probabilities[: len(asked)][order],
    )
    return scores, float((values[len(asked) :].argmax(axis=1) == train.labels_N).mean())


def _vectors(store: Store, part: Part, index: Index, plan: TrainingPlan) -> Iterator["np.ndarray[Any, Any]"]:
    for first in range(0, len(index.clips(plan.split, part)), _CLIPS_A_TASK):
        yield np.load(io.BytesIO(store.read(f"{part}{first:07d}.npz")))["vectors"]


def _kept(site: Site, plan: TrainingPlan) -> Store:
    return open_store(f"{plan.uri}/tdd", site.s3)


def _write(store: Store, name: str, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    store.write(name, buffer.getvalue())
