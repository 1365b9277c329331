"""tavlad features: maps of the frozen part of a trunk, of every view of a split's clips, computed once by a pool of
actors; and whether a stage is to learn from them."""

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch

from infra.site import Site, load_site
from ray_jobs.cluster import connect, require_room, result_of, room_for
from ray_jobs.codebook import build_untrained
from ray_jobs.console import Console
from ray_jobs.feature_batches import entries_of
from ray_jobs.plan import TrainingPlan, open_set
from ray_jobs.recipe import Recipe
from shards.features import CENTRE_SLOT, EARLY_MAP, FeatureSet, FeatureShard, FeatureTable, fingerprint, other_sets
from shards.index import Index
from shards.read import ClipLoader, LoaderOptions
from shards.read_ahead import read_ahead
from shards.store import Store, open_store
from shards.transforms import VIEWS, views_of
from tavlad.clip import FeatureKind, Features
from tavlad.config import StageConfig
from tavlad.errors import UserError
from tavlad.memory import keep_freed_memory
from tavlad.model import TaVlad
from tavlad.parallel import autocast

_DECISIONS = {1: "features.json", 2: "features-stage2.json"}
_FORMAT = 1  # raise it when the same facts would no longer give the same features
_GIGABYTE = 1_000_000_000
_VIEWS_BYTES = 64_000_000  # of what an actor computes at a time for a sweep: lost if it dies
_CLIPS_AT_ONCE = 8  # through the trunk of a GPU; a CPU takes them one by one anyway
_PROBED_CLIPS = 2
_WORTH = 1.2  # features must save this many times what storing and reading them costs


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """A feature set that has all a split needs."""

    uri: str
    num_views: int
    num_entries: int
    """Clips times views, those of the test part included."""
    num_bytes: int
    was_there: bool


def fill_features(
    site: Site, recipe: Recipe, split: int, num_views: int | None, console: Console, stage: StageConfig
) -> Filled:
    """Fill the feature set of the recipe's data set, trunk and stage with what `split` needs; what is there is kept."""
    recipe.require_named_features(stage)
    num_views = num_views or recipe.training.num_views
    _, index = open_set(site, recipe.dataset, recipe)
    connect(site, console.say)
    require_room(site, _asked(recipe))
    model, provenance = build_untrained(site, recipe, len(index.actions))
    features = feature_set(site, recipe, index, model, provenance, stage.feature_kind)
    del model
    plan = features.plan(index, split, num_views)
    num_entries = sum(len(shard.rows) for shard in plan)
    filled = Filled(
        uri=features.store.uri,
        num_views=num_views,
        num_entries=num_entries,
        num_bytes=num_entries * features.entry_bytes,
        was_there=features.filled(split, num_views) is not None,
    )
    console.heading(f"Features of {index.name}, split {split}, {num_views} views a clip, at {filled.uri}")
    if filled.was_there:
        console.say("  filled already")
        return filled
    for difference in other_sets(open_store(site.features_uri, site.s3), features.facts):
        console.say(f"  not these: {difference}")
    missing = features.missing(plan)
    _check_budget(recipe, features, sum(len(shard.rows) for shard in missing), num_views, index, split)
    _fill(site, recipe, features, missing, console)
    features.publish(index, split, num_views)
    return filled


def may_use_features(recipe: Recipe, stage: StageConfig, model: TaVlad) -> bool:
    """Whether it is a question at all. A recipe that insists on what cannot be is refused by `feature_set`."""
    if stage.features == "never" or recipe.training.views != "corner-scale" or model.trunk.joins_frames:
        return False
    if not recipe.names_features(stage):
        return False
    return stage.features == "always" or stage.feature_kind == "last" or model.trunk.has_early_map


def feature_set(
    site: Site, recipe: Recipe, index: Index, model: TaVlad, provenance: str, kind: FeatureKind
) -> FeatureSet:
    """The feature set of a data set, a trunk, which of its maps, and the way it is run; empty until filled. ValueError
    for a trunk that has no such map, or that joins frames: features are kept of frames alone."""
    if model.trunk.joins_frames:
        raise UserError(f'features of model.trunk = "{recipe.model.trunk}" are not kept: it joins frames')
    training = recipe.training
    if kind == "early" and not model.trunk.has_early_map:
        raise UserError(
            f'model.trunk = "{recipe.model.trunk}" is not cut below its last block, so nothing of it can be stored for '
            'a stage that trains the trunk: set the stage\'s features = "never"'
        )
    device = next(model.parameters()).device
    blank = torch.zeros(1, 1, 3, training.crop, training.crop, dtype=torch.uint8, device=device)
    with torch.no_grad():
        seen = model.early_features(blank) if kind == "early" else model.features(blank, with_activation=False)
    size, height, width = seen.maps_BTDHW.shape[2:]
    facts: dict[str, str | int] = {
        "format": _FORMAT,
        "name": index.name,
        "dataset": index.fingerprint,
        "subset": str(training.subset),
        # Random weights are a function of the seed.
        "weights": provenance if recipe.model.weights != "none" else f"{provenance} seed {training.seed}",
        "map": EARLY_MAP if kind == "early" else model.described_map,
        "precision": recipe.trunk_precision,
        "dtype": recipe.features.dtype,
        "crop": training.crop,
        "views": f"{len(VIEWS)} of 4 scales, 5 places, 2 flips",
        "num_frames": index.num_frames,
        "size": size,
        "height": height,
        "width": width,
        **recipe.model.trunk_facts,
    }
    if kind == "early":  # whole trunks always store their activation
        has_activation = seen.activation_BTHW is not None
        places = seen.activation_BTHW.shape[2:] if seen.activation_BTHW is not None else (0, 0)
        facts |= {
            "activation": "of a frozen trunk" if has_activation else "none",
            "activation_height": places[0],
            "activation_width": places[1],
        }
    name = f"{index.name}-{fingerprint(facts)[:16]}"
    return FeatureSet(open_store(f"{site.features_uri}/{name}", site.s3), facts)


def feature_loader(recipe: Recipe, index: Index, store: Store, num_threads: int) -> ClipLoader:
    """Reads any clip of the set, in any view."""
    options = LoaderOptions(
        batch_size=1,
        seed=0,
        crop=recipe.training.crop,
        augment=False,
        shuffle=False,
        num_threads=num_threads,
    )
    return ClipLoader(index, store, 1, "all", options)


class Extractor:
    """What is frozen of a model's trunk, on this process's device."""

    def __init__(self, model: TaVlad, device: torch.device, precision: str, kind: FeatureKind) -> None:
        self._model = model.to(device).eval()
        self._device = device
        self._precision = precision
        self._kind: FeatureKind = kind

    @torch.no_grad()
    def __call__(self, frames_BTCHW: torch.Tensor) -> Features:
        """The features of clips; of whole trunks with their activation, if there is one."""
        with autocast(self._device, self._precision):
            if self._kind == "early":
                return self._model.early_features(frames_BTCHW.to(self._device))
            has_activation = self._model.trunk.has_activation_maps
            return self._model.features(frames_BTCHW.to(self._device), with_activation=has_activation)

    def seconds_per_clip(self, frames_BTCHW: torch.Tensor) -> float:
        """Measured, after a run that warms up."""
        self(frames_BTCHW[:1]).maps_BTDHW.float().sum().item()
        started = time.perf_counter()
        self(frames_BTCHW).maps_BTDHW.float().sum().item()
        return (time.perf_counter() - started) / len(frames_BTCHW)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipViews:
    """Some clips, each in a slot of its own: what a sweep reads, and no more."""

    rows: tuple[int, ...]
    """Of the set's index."""
    slots: tuple[int, ...]


def fill_views(
    site: Site, recipe: Recipe, features: FeatureSet, index: Index, wanted: set[tuple[int, int]], console: Console
) -> int:
    """Compute those of the wanted (row, slot) that are nowhere stored; how many they were."""
    table = FeatureTable(index.clips_table, features.found(1, len(VIEWS)))
    missing = sorted(item for item in wanted if table.present[item] < 0)
    at_once = max(1, min(_VIEWS_BYTES // features.entry_bytes, -(-len(missing) // (2 * _num_actors(recipe)))))
    jobs = [
        ClipViews(rows=tuple(row for row, _ in part), slots=tuple(slot for _, slot in part))
        for part in (missing[start : start + at_once] for start in range(0, len(missing), at_once))
    ]
    _fill(site, recipe, features, jobs, console)
    return len(missing)


def _fill(
    site: Site,
    recipe: Recipe,
    features: FeatureSet,
    missing: Sequence[FeatureShard | ClipViews],
    console: Console,
) -> None:
    if not missing:
        return
    total = sum(len(shard.rows) for shard in missing)
    start = _Filler.options(num_cpus=_asked(recipe)["CPU"], num_gpus=_asked(recipe)["GPU"])
    actors: list[Any] = [
        start.remote(site.name, recipe, features) for _ in range(min(len(missing), _num_actors(recipe)))
    ]
    try:
        seconds = result_of(actors[0].seconds_per_clip.remote())
        console.say(
            f"  {total} clip views to compute, {total * features.entry_bytes / _GIGABYTE:.2f} GB, about "
            f"{_minutes(total * seconds / len(actors))} with {len(actors)} actors"
        )
        idle, waiting, done = list(actors), list(missing), 0
        running: dict[Any, tuple[Any, FeatureShard | ClipViews]] = {}
        with console.progress("clip views", total) as advance:
            while waiting or running:
                while waiting and idle:
                    actor, shard = idle.pop(), waiting.pop(0)
                    running[actor.fill.remote(shard)] = (actor, shard)
                finished, _ = ray.wait(list(running))
                for reference in finished:
                    actor, shard = running.pop(reference)
                    result_of(reference)
                    idle.append(actor)
                    done += len(shard.rows)
                    advance(done, "")
    finally:
        for actor in actors:
            ray.kill(actor)


def _asked(recipe: Recipe) -> dict[str, float]:
    """By one actor."""
    return {"CPU": recipe.resources.cpus_per_worker, "GPU": recipe.resources.gpus_per_worker}


def _num_actors(recipe: Recipe) -> int:
    """As many as the cluster has room for."""
    return room_for(recipe.resources.cpus_per_worker, recipe.resources.gpus_per_worker)


@ray.remote(max_restarts=3, max_task_retries=3)
class _Filler:
    """Computes shards of a feature set."""

    def __init__(self, site_name: str, recipe: Recipe, features: FeatureSet) -> None:
        torch.set_num_threads(max(1, int(recipe.resources.cpus_per_worker)))
        site = load_site(site_name)
        store, self._index = open_set(site, recipe.dataset, recipe)
        self._features = features
        model, _ = build_untrained(site, recipe, len(self._index.actions))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        keep_freed_memory(device)
        self._extract = Extractor(model, device, recipe.training.precision, features.kind)
        self._loader = feature_loader(recipe, self._index, store, recipe.resources.unmeasured_threads)

    def seconds_per_clip(self) -> float:
        clips = range(min(_PROBED_CLIPS, len(self._index.clips_table)))
        return self._extract.seconds_per_clip(torch.stack([self._loader.read_view(row, None) for row in clips]))

    def fill(self, job: FeatureShard | ClipViews) -> None:
        if isinstance(job, FeatureShard):
            views = [(row, job.slot) for row in job.rows]
            self._features.write_shard(self._index, job, self._entries(views))
            return
        through = self._features.through()
        views = list(zip(job.rows, job.slots, strict=True))
        for (row, slot), entry in zip(views, self._entries(views), strict=True):
            through.add(self._loader.clips.key(row), slot, entry)
        through.flush()

    def _entries(self, views: list[tuple[int, int]]) -> Any:
        threads = self._loader.options.num_threads
        clips = read_ahead(lambda view: self._frames(*view), views, threads, 2 * _CLIPS_AT_ONCE)
        for start in range(0, len(views), _CLIPS_AT_ONCE):
            batch = [next(clips) for _ in views[start : start + _CLIPS_AT_ONCE]]
            yield from entries_of(self._extract(torch.stack(batch)), self._features.dtype)

    def _frames(self, row: int, slot: int) -> torch.Tensor:
        view = None if slot == CENTRE_SLOT else views_of(self._loader.clips.key(row))[slot]
        return self._loader.read_view(row, view)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a stage asks of the frozen part of its trunk."""

    train_clips: int
    test_clips: int
    epochs: int
    evaluations: int
    num_views: int
    train_present: int
    """Views of the training clips that are stored already, of `num_views` each."""
    test_present: int
    """Test clips whose centre view is."""

    @property
    def from_frames(self) -> int:
        """Clips that go through the trunk if nothing is stored."""
        return self.train_clips * self.epochs + self.test_clips * self.evaluations

    @property
    def from_features(self) -> int:
        """Clips that go through it, in expectation, if everything is: of the distinct views that `epochs` draws show,
        those that are not there."""
        distinct = 1 - (1 - 1 / self.num_views) ** self.epochs
        missing = self.train_clips * self.num_views - self.train_present
        test = self.test_clips - self.test_present if self.evaluations else 0
        return round(missing * distinct) + test


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Measured seconds for one clip in one view."""

    compute: float
    write: float
    read: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether a stage learns from features, and why."""

    use_features: bool
    reason: str


def decide(wanted: str, load: Workload, rates: Rates, entry_bytes: int, budget_gigabytes: float) -> Decision:
    """`wanted` is the recipe's "auto" or "always". ValueError if "always" does not fit into the budget."""
    num_bytes = load.from_features * entry_bytes
    size = f"{num_bytes / _GIGABYTE:.2f} GB"
    if num_bytes > budget_gigabytes * _GIGABYTE:
        over = f"features of {load.num_views} views a clip would take {size}, features.budget_gigabytes is "
        over += f"{budget_gigabytes:g}"
        if wanted == "always":
            raise UserError(f"{over}: raise it, or lower training.num_views")
        return Decision(use_features=False, reason=f"from frames: {over}")
    saved = load.from_frames - load.from_features
    frames = load.from_frames * rates.compute
    features = load.from_features * (rates.compute + rates.write) + max(0, saved) * rates.read
    times = f"what is frozen takes about {_minutes(features)} instead of {_minutes(frames)}"
    if wanted == "always" or saved * rates.compute > _WORTH * (features - load.from_features * rates.compute):
        return Decision(use_features=True, reason=f"from features ({size}): {times}")
    return Decision(use_features=False, reason=f"from frames: with features ({size}) {times}")


def decide_once(
    site: Site,
    plan: TrainingPlan,
    number: Literal[1, 2],
    features: FeatureSet,
    extract: Extractor,
    train: ClipLoader,
    test: ClipLoader,
) -> Decision:
    """The decision for a stage, made at a training's first start and kept: resumed, it computes what it would have."""
    store, stage = open_store(plan.uri, site.s3), dict(plan.stages)[number]
    if store.exists(_DECISIONS[number]):
        return Decision(**json.loads(store.read(_DECISIONS[number])))
    recipe, num_views = plan.recipe, plan.recipe.training.num_views if plan.recipe.training.augment else 1
    load = Workload(
        train_clips=train.num_clips,
        test_clips=test.num_clips,
        epochs=stage.epochs * stage.passes(train.num_steps),
        evaluations=-(-stage.epochs // recipe.training.evaluate_every),
        num_views=num_views,
        train_present=count_present(features, train, plan.split, num_views),
        test_present=count_present(features, test, plan.split, num_views),
    )
    rates = measure_rates(extract, train, features)
    decision = decide(stage.features, load, rates, features.entry_bytes, recipe.features.budget_gigabytes)
    store.write(_DECISIONS[number], json.dumps(dataclasses.asdict(decision)).encode())
    return decision


def measure_rates(extract: Extractor, loader: ClipLoader, features: FeatureSet) -> Rates:
    """What computing, writing and reading the features of a clip take here and now."""
    frames = torch.stack([loader.read_view(row, None) for row in range(min(_PROBED_CLIPS, loader.num_clips))])
    path, content = f"probe/{uuid.uuid4().hex}", os.urandom(features.entry_bytes)
    started = time.perf_counter()
    features.store.write(path, content)
    written = time.perf_counter()
    features.store.read(path)
    read = time.perf_counter()
    features.store.delete(path)
    return Rates(compute=extract.seconds_per_clip(frames), write=written - started, read=read - written)


def count_present(features: FeatureSet, loader: ClipLoader, split: int, num_views: int) -> int:
    """Stored views of a loader's clips, of those that it shows."""
    present = FeatureTable(loader.clips, features.found(split, num_views)).present >= 0
    return int((present[:, :num_views] if loader.options.augment else present[:, CENTRE_SLOT]).sum())


def _check_budget(
    recipe: Recipe, features: FeatureSet, num_entries: int, num_views: int, index: Index, split: int
) -> None:
    num_bytes, budget = num_entries * features.entry_bytes, recipe.features.budget_gigabytes * _GIGABYTE
    if num_bytes <= budget:
        return
    train, test = (len(index.clips(split, part)) for part in ("train", "test"))
    fitting = max(0, int((budget / features.entry_bytes - test) // train))
    raise UserError(
        f"{num_views} views a clip would take {num_bytes / _GIGABYTE:.1f} GB, and features.budget_gigabytes is "
        f"{recipe.features.budget_gigabytes:g}: raise it" + (f", or choose --views {fitting}" if fitting else "")
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
