"""The accuracy of recipes on two small sets of real clips, by our own packing, features, training and evaluation.

python -m benchmarks.small_sets DATA [--sets weizmann ut_interaction] [--recipes small small-flow] [--seeds 0 1 2]
                                        [--work FOLDER]

DATA holds the folders `weizmann` (90 clips; its three splits, three actors held out in each) and `ut_interaction` (set
1, 60 clips; each of ten sequences held out in turn), each with `videos/ACTION/...` and a table `clips.csv`. Recipes are
trained in stage 1 on every fold with every seed; the recipes' scores of the same clips are fused too. An accuracy is of
the test clips of all folds together. Nothing is chosen here: the last epoch counts. Packed sets and features stay in
FOLDER, and are found again.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ray_jobs.feature_batches import FeatureBatches, pooled_if_possible
from ray_jobs.features import Extractor
from ray_jobs.recipe import Recipe, load_recipe
from ray_jobs.trial import trial_loading
from shards.datasets import Video, VideoSet
from shards.features import FeatureSet, fingerprint
from shards.index import ClipTable, Index
from shards.pack import finish, finished_set, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader
from shards.store import Store, open_store
from tavlad.backbone import load_weights
from tavlad.codebook import descriptors_of, learn_words, random_frames
from tavlad.metrics import Scores, fuse
from tavlad.model import TaVlad
from tavlad.train import EpochReport, Listeners, StagePlan, fit

_CPU = torch.device("cpu")
_HELD_OUT_GROUPS = {"weizmann": "actor", "ut_interaction": "sequence"}
"""The column of clips.csv that is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packed:
    """A packed set, its store, and the groups that its folds hold out."""

    index: Index
    store: Store
    folds: list[set[str]]


def _video_set(data: Path, name: str) -> tuple[VideoSet, list[set[str]]]:
    folder, column = data / name, _HELD_OUT_GROUPS[name]
    with (folder / "clips.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    videos = [
        Video(
            path=folder / row["path"],
            name=row["path"].removeprefix("videos/"),
            action=row["class"],
            splits=("train", "train", "train"),
            group=row[column],
        )
        for row in rows
    ]
    groups = sorted({video.group for video in videos})
    if name == "weizmann":
        folds = [
            {row["actor"] for row in rows if row["path"].removeprefix("videos/") in test} for test in _tests(folder)
        ]
    else:
        folds = [{group} for group in groups]
    actions = tuple(sorted({video.action for video in videos}))
    ordered = tuple(sorted(videos, key=lambda video: video.name))
    return VideoSet(name=name, actions=actions, videos=ordered, num_unlisted=0), folds


def _tests(folder: Path) -> Iterator[set[str]]:
    """Names of the test clips of each published split."""
    for split in (1, 2, 3):
        lines = (folder / "splits_ucf_format" / f"testlist0{split}.txt").read_text(encoding="utf-8").split("\n")
        yield {line.strip() for line in lines if line.strip()}


def _pack(data: Path, name: str, recipe: Recipe, work: Path) -> _Packed:
    video_set, folds = _video_set(data, name)
    modality = recipe.model.modality
    store = open_store(str(work / f"{name}-{modality}"))
    plan = plan_packing(video_set, PackOptions(modality=modality))
    index = finished_set(plan, store)
    if index is None:
        index = finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)
    return _Packed(index=index, store=store, folds=folds)


def _fold(index: Index, held_out: set[str]) -> Index:
    """The set with these groups as the test part of split 1, all others as its training part."""
    table = index.clips_table.table
    parts = ["test" if group in held_out else "train" for group in table["group"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("split1"), "split1", pa.array(parts))
    return replace(index, clips_table=ClipTable.of(table))


def _model(recipe: Recipe, num_actions: int) -> tuple[TaVlad, str]:
    torch.manual_seed(recipe.training.seed)
    model = TaVlad(recipe.model, num_actions)
    return model, load_weights(model.trunk, recipe.model.trunk, recipe.model.weights)


def _features(recipe: Recipe, index: Index, model: TaVlad, weights: str, work: Path) -> FeatureSet:
    training = recipe.training
    blank = torch.zeros(1, 1, 3, training.crop, training.crop, dtype=torch.uint8)
    with torch.no_grad():
        size, height, width = model.features(blank, with_activation=False).maps_BTDHW.shape[2:]
    facts: dict[str, str | int] = {
        **{"name": index.name, "dataset": index.fingerprint, "weights": weights, "map": model.described_map},
        **{"precision": training.precision, "dtype": recipe.features.dtype, "crop": training.crop},
        **{"num_frames": index.num_frames, "size": size, "height": height, "width": width},
    }
    return FeatureSet(open_store(str(work / f"features-{fingerprint(facts)[:16]}")), facts)


def _sampled_maps(
    recipe: Recipe, seen: Index, store: Store, features: FeatureSet, extract: Extractor
) -> "np.ndarray[Any, Any]":
    """What `sample_maps` takes of the training clips, read from their features of the centre view."""
    reading = replace(trial_loading(recipe, training=False), shuffle=False)
    loader = ClipLoader(seen, store, 1, "train", reading)
    maps: list[np.ndarray] = []
    for _, items, entries in FeatureBatches(loader, features, 1, extract).steps(0):
        for item in items:
            frames = random_frames(
                recipe.training.seed, loader.clips.key(item.row), seen.num_frames, recipe.codebook.frames_per_video
            )
            maps.append(entries[item].map_TDHW[frames])
    return np.concatenate(maps)[: recipe.codebook.frames]


def _scores(recipe: Recipe, packed: _Packed, held_out: set[str], work: Path) -> Scores:
    """Of the last epoch on the fold's test clips."""
    training, seen = recipe.training, _fold(packed.index, held_out)
    model, weights = _model(recipe, len(seen.actions))
    features = _features(recipe, packed.index, model, weights, work)
    extract = Extractor(model, _CPU, training.precision, features.kind)
    if recipe.model.has_vlad:
        maps = _sampled_maps(recipe, seen, packed.store, features, extract)
        model.initialise(learn_words(descriptors_of(maps), recipe.model, training.seed))
    loaders = [
        ClipLoader(seen, packed.store, 1, part, trial_loading(recipe, training=part == "train"))
        for part in ("train", "test")
    ]
    train, test = (
        pooled_if_possible(FeatureBatches(loader, features, 1, extract), model, recipe.stage1) for loader in loaders
    )
    reports: list[EpochReport] = []
    plan = StagePlan(number=1, stage=recipe.stage1, training=replace(training, evaluate_every=recipe.stage1.epochs))
    fit(model, plan, train, test, Listeners(on_epoch=reports.append))
    scores = reports[-1].scores
    assert scores is not None, "the last epoch is evaluated"
    return scores


def _joined(folds: list[Scores]) -> float:
    """Share of the test clips of all folds that are right, in %."""
    right = sum(round(scores.top(1) * len(scores.keys)) for scores in folds)
    return 100 * right / sum(len(scores.keys) for scores in folds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(_HELD_OUT_GROUPS), choices=list(_HELD_OUT_GROUPS))
    parser.add_argument("--recipes", nargs="+", default=["small", "small-flow"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change of every recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(".tavlad/small_sets"))
    options = parser.parse_args()
    print("| set | recipe | accuracy, % | of each seed |\n|---|---|---|---|")
    for name in options.sets:
        accuracies: dict[str, list[float]] = {}
        for seed in options.seeds:
            by_recipe: dict[str, list[Scores]] = {}
            for recipe_name in options.recipes:
                changes = [*options.set, f"training.seed={seed}"]
                recipe = load_recipe(recipe_name, changes, name)
                packed = _pack(options.data, name, recipe, options.work)
                by_recipe[recipe_name] = []
                for number, fold in enumerate(packed.folds, 1):
                    by_recipe[recipe_name].append(_scores(recipe, packed, fold, options.work))
                    so_far = f"{_joined(by_recipe[recipe_name]):.1f} % so far"
                    print(
                        f"{name}, {recipe_name}, seed {seed}: fold {number}/{len(packed.folds)}, {so_far}",
                        file=sys.stderr,
                    )
            if len(by_recipe) > 1:
                by_recipe["fused"] = [fuse(scores) for scores in zip(*by_recipe.values(), strict=True)]
            for recipe_name, folds in by_recipe.items():
                accuracies.setdefault(recipe_name, []).append(_joined(folds))
        for recipe_name, values in accuracies.items():
            each = ", ".join(f"{value:.1f}" for value in values)
            print(f"| {name} | {recipe_name} | {statistics.mean(values):.1f} | {each} |", flush=True)
        print(json.dumps({"set": name, "seeds": options.seeds, "accuracy": accuracies}))


if __name__ == "__main__":
    main()
