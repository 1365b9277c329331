"""An epoch of stage 2 from packed shards on S3, against the same steps on batches that are in memory already.

python benchmarks/epoch.py [VIDEOS] [--clips 16] [--batch 4] [--crop 224] [--repeats 3] [--evaluate] [--out FOLDER]

With --evaluate the clips are scored instead (`tavlad.evaluate`), and the trunk's forward pass alone is measured too.

VIDEOS is a folder with a folder of videos an action; without it 64 videos are rendered. They are packed and put on a
real S3 server of this machine, which takes its share of the same cores. "Cold" has no clip on the node's disk yet.
"Stored maps" are those below the last block (stage2.features): what an epoch is when it need not run what is frozen.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.harness import Figures, interleaved, machine_facts, timed, write_results
from benchmarks.stage2 import untrained
from infra import local
from ray_jobs.feature_batches import FeatureBatches
from ray_jobs.features import Extractor
from shards.datasets import scan
from shards.disk_cache import DiskCache
from shards.features import EARLY_MAP, FeatureSet
from shards.index import Index
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader, LoaderOptions
from shards.render import render_videos
from shards.store import Store, open_store
from tavlad.clip import Batch
from tavlad.config import STAGE2, TrainingConfig
from tavlad.evaluate import evaluate
from tavlad.model import TaVlad
from tavlad.parallel import autocast
from tavlad.train import Batches, Listeners, StagePlan, fit

_CPU = torch.device("cpu")


class _Held:
    """Batches of an epoch, read beforehand."""

    def __init__(self, loader: ClipLoader) -> None:
        self._batches: list[Batch] = [
            dataclasses.replace(batch, frames_BTCHW=batch.frames_BTCHW.clone()) for batch in loader.epoch(0)
        ]
        self.num_steps = len(self._batches)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        return iter(self._batches[start_step:])


def _pack(videos: Path, num_clips: int, store: Store) -> Index:
    video_set = scan("bench", videos, "folders")
    chosen = video_set.videos[:: max(1, len(video_set.videos) // num_clips)][:num_clips]
    actions = tuple(sorted({video.action for video in chosen}))
    plan = plan_packing(dataclasses.replace(video_set, videos=chosen, actions=actions), PackOptions())
    return finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)


def _epoch(model: TaVlad, batches: Batches, options: argparse.Namespace) -> None:
    if options.evaluate:
        evaluate(model, batches.epoch(0), "auto")
        return
    training = TrainingConfig(batch_size=options.batch, crop=options.crop)
    plan = StagePlan(number=2, stage=dataclasses.replace(STAGE2, epochs=1), training=training)
    fit(model, plan, batches, None, Listeners(on_epoch=lambda _: None))


@torch.no_grad()
def _trunk_alone(model: TaVlad, batches: Batches) -> None:
    for batch in batches.epoch(0):
        with autocast(_CPU, "auto"):
            model.features(batch.inputs(_CPU))


def _stored(model: TaVlad, index: Index, remote: Store, loader: ClipLoader, cache: DiskCache) -> FeatureBatches:
    """The loader's clips as the maps below the last block."""
    extract = Extractor(model, _CPU, "auto", "early")
    frames = torch.zeros(1, 1, 3, loader.options.crop, loader.options.crop, dtype=torch.uint8)
    size, height, width = extract(frames).maps_BTDHW.shape[2:]
    shape = {"num_frames": index.num_frames, "size": size, "height": height, "width": width}
    shape |= {"activation_height": 0, "activation_width": 0}
    return FeatureBatches(
        loader, FeatureSet(remote, {"map": EARLY_MAP, "dtype": "float16", **shape}), 1, extract, cache
    )


def _measure(index: Index, remote: Store, maps: Store, folder: Path, options: argparse.Namespace) -> dict[str, Figures]:
    model, cache_folder = untrained(options.trunk), folder / "cache"
    cache = DiskCache(folder=cache_folder, max_bytes=10**10, set_name="bench")
    shown = {"augment": not options.evaluate, "shuffle": not options.evaluate}
    how = LoaderOptions(batch_size=options.batch, seed=0, crop=options.crop, num_threads=options.loaders, **shown)
    loader = ClipLoader(index, remote, 1, "all", how, cache=cache)
    held, stored = _Held(loader), _stored(model, index, maps, loader, cache)

    def cold(make: Callable[[DiskCache], Batches]) -> Figures:
        shutil.rmtree(cache_folder)
        fresh = make(DiskCache(folder=cache_folder, max_bytes=10**10, set_name="bench"))
        return timed(lambda: _epoch(model, fresh, options))

    variants: dict[str, Callable[[], Figures]] = {
        "batches in memory": lambda: timed(lambda: _epoch(model, held, options)),
        "shards on S3, node's cache cold": lambda: cold(
            lambda empty: ClipLoader(index, remote, 1, "all", how, cache=empty)
        ),
        "shards on S3, node's cache warm": lambda: timed(lambda: _epoch(model, loader, options)),
        "stored maps on S3, node's cache cold": lambda: cold(lambda empty: _stored(model, index, maps, loader, empty)),
        "stored maps on S3, node's cache warm": lambda: timed(lambda: _epoch(model, stored, options)),
    }
    if options.evaluate:
        variants["the trunk's forward pass alone"] = lambda: timed(lambda: _trunk_alone(model, held))
    _epoch(model, held, options)  # warms up
    _epoch(model, stored, options)  # fills
    rows = interleaved(variants, options.repeats)
    limit = rows["batches in memory"]
    for row in rows.values():
        row["clips_per_second"] = 1000 * loader.num_clips / row["ms"]
        row["of_in_memory"] = limit["ms"] / row["ms"]
        row["of_in_memory_by_cpu"] = limit["cpu_ms"] / row["cpu_ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="?", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--trunk", default="resnet34")
    parser.add_argument("--evaluate", action="store_true", help="score the clips instead of learning from them")
    parser.add_argument("--loaders", type=int, default=2, help="decoding threads, as resources.loader_threads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="tavlad-bench-") as name:
        folder = Path(name)
        os.environ["TAVLAD_HOME"] = str(folder / "home")
        videos = options.videos
        if videos is None:
            videos = folder / "videos"
            render_videos(videos, 8, 0)
        store = open_store(str(folder / "set"))
        index = _pack(videos, options.clips, store)
        try:
            site = local.up(services=["s3"])
            remote = open_store("s3://tavlad/bench", site.s3)
            for path in store.list():
                remote.write(path, store.read(path))
            maps = open_store("s3://tavlad/bench-maps", site.s3)
            rows = _measure(index, remote, maps, folder, options)
        finally:
            local.down()
    facts = {key: getattr(options, key) for key in ("clips", "batch", "crop", "trunk", "loaders", "threads", "repeats")}
    name, title = ("evaluation", "evaluation") if options.evaluate else ("epoch", "epoch of stage 2")
    write_results(options.out, name, facts | machine_facts(("torch",)), {title: rows})


if __name__ == "__main__":
    main()
