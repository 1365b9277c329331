"""Stage 1 from features and from frames, side by side: seconds a clip and epoch, and what a sweep of 9 trials costs.

python benchmarks/stage1.py VIDEOS [--clips 16] [--repeats 3] [--trunk resnet34]
python benchmarks/stage1.py VIDEOS --clips 4 --repeats 1 --epochs 1 --views 2    # whether it runs

VIDEOS is a folder per action. Rounds are interleaved, medians are shown. "arithmetic" is the ratio of multiplications:
what a machine without any overhead would give. The trunk has random weights; the visual words are learned from its
maps, as in a training. About 6 minutes on 2 idle cores. On a machine that others use, `--threads 1` gives truer ratios:
threads that wait for each other cost the small operators of stage 1 more than the trunk's large ones.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from ray_jobs.feature_batches import FeatureBatches, entries_of
from ray_jobs.features import Extractor
from shards.datasets import scan
from shards.disk_cache import DiskCache
from shards.features import CENTRE_SLOT, FeatureSet
from shards.index import Index
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader, LoaderOptions
from shards.store import Store, open_store
from shards.transforms import views_of
from tavlad.codebook import descriptors_of, learn_words, sample_maps
from tavlad.config import CodebookConfig, ModelConfig, StageConfig, TrainingConfig
from tavlad.frozen import normalise
from tavlad.model import TaVlad
from tavlad.parallel import autocast, quick_precision
from tavlad.train import Batches, Listeners, StagePlan, fit
from tavlad.trunk import TrunkMaps, TrunkNetwork
from tavlad.vlad import VisualWords

BATCH_SIZE, CROP = 8, 224
QUICK = quick_precision("cpu")
GMAC_TRUNK = 92.0  # of a clip: ResNet-34 forward
WIDTHS, RATES = (64, 128, 256), (3e-3, 1e-2, 3e-2)


def _gmac_head(config: ModelConfig, size: int = 512, frames: int = 25, places: int = 49) -> float:
    """Of a clip in stage 1: VLAD forward; the GRU's two products forward, their weights' gradients, and the states'."""
    width, sequences = config.gru_width, frames * config.num_clusters
    return sequences * (3 * width * (2 * size + 3 * width) + 2 * places * size) / 1e9


class _PlainTrunk:
    """The trunk as anyone would run it: float32, channels first, batch norms of their own."""

    def __init__(self, trunk: TrunkNetwork) -> None:
        self._trunk = trunk

    @torch.no_grad()
    def maps(self, images_BCHW: torch.Tensor, frames_per_pass: int) -> TrunkMaps:
        del frames_per_pass
        return self._trunk.maps(normalise(self._trunk, images_BCHW, torch.float32).contiguous())


def _model(config: ModelConfig, num_actions: int, words: VisualWords | None = None) -> TaVlad:
    torch.manual_seed(0)
    model = TaVlad(config, num_actions)
    if words is not None:
        model.initialise(words)
    return model


def _words(config: ModelConfig, num_actions: int, loader: ClipLoader) -> VisualWords:
    """Of as many frames as give a few hundred descriptors a word."""
    maps = sample_maps(_model(config, num_actions), loader.epoch(0), CodebookConfig(frames_per_video=8), 0, QUICK)
    return learn_words(descriptors_of(maps), config, seed=0)


def _pack(videos: Path, num_clips: int, store: Store) -> Index:
    video_set = scan("benchmark", videos, "folders")
    chosen = replace(video_set, videos=video_set.videos[:: max(1, len(video_set.videos) // num_clips)][:num_clips])
    actions = tuple(sorted({video.action for video in chosen.videos}))
    plan = plan_packing(replace(chosen, actions=actions), PackOptions())
    return finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)


def _loader(index: Index, store: Store, num_views: int, cache: DiskCache) -> ClipLoader:
    options = LoaderOptions(
        batch_size=BATCH_SIZE, seed=0, crop=CROP, augment=True, shuffle=True, num_views=num_views, num_threads=1
    )
    return ClipLoader(index, store, 1, "all", options, cache=cache)


def _features(model: TaVlad, index: Index, store: Store, precision: str) -> FeatureSet:
    with torch.no_grad():
        size, height, width = model.features(torch.zeros(1, 1, 3, CROP, CROP, dtype=torch.uint8)).maps_BTDHW.shape[2:]
    shape = {"num_frames": index.num_frames, "size": size, "height": height, "width": width}
    return FeatureSet(store, {"name": index.name, "precision": precision, "dtype": "float16", **shape})


def _fill(features: FeatureSet, loader: ClipLoader, extract: Extractor, num_views: int) -> None:
    through = features.through()
    for row in range(loader.num_clips):
        key = loader.clips.key(row)
        for slot in range(num_views):
            frames_TCHW = loader.read_view(row, None if slot == CENTRE_SLOT else views_of(key)[slot])
            (entry,) = entries_of(extract(frames_TCHW[None]), features.dtype)
            through.add(key, slot, entry)
    through.flush()


def _train(
    model: TaVlad, batches: Batches, precision: Literal["bf16", "float32"], epochs: int = 1, lr: float = 1e-2
) -> float:
    """Seconds of so many epochs of stage 1."""
    training = TrainingConfig(batch_size=BATCH_SIZE, precision=precision, crop=CROP)
    plan = StagePlan(number=1, stage=StageConfig(epochs=epochs, lr=lr), training=training)
    started = time.perf_counter()
    fit(model, plan, batches, None, Listeners(on_epoch=lambda _: None))
    return time.perf_counter() - started


def _head_share(model: TaVlad, features: FeatureBatches) -> float:
    """Share of a step from features that GRU and classifier take, forward and backward."""
    whole = statistics.median(_train(model, features, QUICK) for _ in range(3)) / features.num_steps
    (batch, *_) = features.epoch(0)
    with torch.no_grad():
        maps = model.describe(batch.inputs(torch.device("cpu")))
        assert model.vlad is not None
        vlad_BTKD = model.vlad(maps.descriptors_BTND, maps.attention_BTN)
    model.train()
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        with autocast(torch.device("cpu"), QUICK):
            clip = model._over_time(vlad_BTKD)  # pyright: ignore[reportPrivateUsage]
            logits = model.classifier(torch.nn.functional.normalize(clip, dim=-1).flatten(1))
        logits.float().logsumexp(dim=1).sum().backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / whole


@dataclass(frozen=True, kw_only=True, slots=True)
class _Swept:
    """Seconds of a sweep and of what it is compared with."""

    frames: float
    """One stage 1 from frames."""
    filling: float
    trials: float
    """Nine stages 1 from features."""


def _sweep(
    index: Index, store: Store, features: Store, cache: DiskCache, words: VisualWords, options: argparse.Namespace
) -> _Swept:
    config, actions = ModelConfig(trunk=options.trunk, weights="none"), len(index.actions)
    epochs = options.epochs
    frames = _train(_model(config, actions, words), _loader(index, store, 40, cache), QUICK, epochs=epochs)
    started = time.perf_counter()
    loader = _loader(index, store, options.views, cache)
    model = _model(config, actions)
    features_set = _features(model, index, features, QUICK)
    extract = Extractor(model, torch.device("cpu"), QUICK, "last")
    _fill(features_set, loader, extract, options.views)
    filled = time.perf_counter()
    for lr, width in product(RATES, WIDTHS):
        trial = _model(replace(config, gru_width=width), actions, words)
        _train(trial, FeatureBatches(loader, features_set, 1, extract, cache), QUICK, epochs=epochs, lr=lr)
    return _Swept(frames=frames, filling=filled - started, trials=time.perf_counter() - filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trunk", default="resnet34")
    parser.add_argument("--epochs", type=int, default=10, help="of each training of the sweep")
    parser.add_argument("--views", type=int, default=8, help="that the sweep's features hold of a clip")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
        root = Path(folder)
        store = open_store(str(root / "set"))
        index = _pack(options.videos.absolute(), options.clips, store)
        cache = DiskCache(folder=root / "cache", max_bytes=10**11, set_name=index.fingerprint)
        config, num_clips = ModelConfig(trunk=options.trunk, weights="none"), len(index.clips_table)
        loader = _loader(index, store, 1, cache)
        words = _words(config, len(index.actions), loader)
        plain, fast, stored = (_model(config, len(index.actions), words) for _ in range(3))
        plain._frozen_trunk = _PlainTrunk(plain.trunk)  # type: ignore[assignment]
        features = _features(stored, index, open_store(str(root / "features")), QUICK)
        extract = Extractor(stored, torch.device("cpu"), QUICK, "last")
        _fill(features, loader, extract, 1)
        batches = FeatureBatches(loader, features, 1, extract, cache)
        runs: dict[str, Callable[[], float]] = {
            "frames, float32, plain": lambda: _train(plain, loader, "float32"),
            f"frames, {QUICK}, folded, channels last": lambda: _train(fast, loader, QUICK),
            _STORED: lambda: _train(stored, batches, QUICK),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(options.repeats + 1):
            for name, run in runs.items():
                took = run() / num_clips
                if repeat:  # the first round warms up
                    seconds[name].append(took)
        assert batches.num_computed == 0, "everything was stored"
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        share = _head_share(stored, batches)
        _print_epochs(medians, config, share)
        swept = _sweep(index, store, open_store(str(root / "swept")), cache, words, options)
    _print_sweep(swept, config, options)
    facts = {"clips": num_clips, "trunk": options.trunk, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(facts | {"seconds_per_clip": medians, "head_share": share, "sweep": asdict(swept)}))


_STORED = "features, float16"


def _print_epochs(medians: dict[str, float], config: ModelConfig, share: float) -> None:
    head = _gmac_head(config)
    limit = (GMAC_TRUNK + head) / head
    print("| stage 1, one epoch | s a clip | features are quicker by | arithmetic |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        bound = "" if name == _STORED else f"{limit:.0f}x"
        print(f"| {name} | {median:.4f} | {median / medians[_STORED]:.1f}x | {bound} |")
    print(f"\nGRU and classifier take {share:.0%} of a step from features", flush=True)


def _print_sweep(swept: _Swept, config: ModelConfig, options: argparse.Namespace) -> None:
    heads = [_gmac_head(replace(config, gru_width=width)) for width in WIDTHS]
    one = options.epochs * (GMAC_TRUNK + _gmac_head(config))
    limit = (options.views * GMAC_TRUNK + options.epochs * len(RATES) * sum(heads)) / one
    print(
        f"9 trials of {options.epochs} epochs: filling {options.views} views {swept.filling:.0f} s, trials "
        f"{swept.trials:.0f} s; together {(swept.filling + swept.trials) / swept.frames:.2f} times one from frames "
        f"({swept.frames:.0f} s), by arithmetic {limit:.2f}"
    )


if __name__ == "__main__":
    main()
