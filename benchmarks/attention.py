"""Does attention help? The same heads with and without it, over seeds, on rendered clutter or on real clips.

python benchmarks/attention.py rendered [--seeds 3] [--stage2]
python benchmarks/attention.py FOLDER [--splits 1 2 3]      (FOLDER/videos, FOLDER/splits_hmdb_format)

One process, no Ray: maps of the frozen EfficientNet-Lite0 are computed once (centre view), stage 1 is
`tavlad.train.fit` on them. With --stage2 the last block, the trunk's classifier and VLAD then learn from frames; only
there do attention that learns ("cam") and that of the untouched trunk ("frozen-cam") differ. Descriptors are reduced to
256 numbers, so that a row takes seconds. Prints a row a training as it ends, the means over the seeds, and how much the
maps vary; --pictures FILE shows what attention looks like.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from shards.datasets import scan
from shards.render import render_videos
from shards.scenes import PAIRS
from shards.transforms import crop_clip
from shards.video import decode_clip
from tavlad import figures
from tavlad.attention import attention_weights
from tavlad.backbone import load_weights
from tavlad.clip import Batch, ClipBatch, FeatureBatch, Features
from tavlad.codebook import learn_words
from tavlad.config import ModelConfig, StageConfig, TrainingConfig
from tavlad.metrics import Scores
from tavlad.model import TaVlad
from tavlad.train import EpochReport, Listeners, StagePlan, fit

ATTENTION = {
    "none": {"attention": "none"},
    "cam, sigmoid (the paper)": {"attention": "cam"},
    "cam, standardised": {"attention": "cam", "attention_scale": "standardised"},
    "cam, minmax": {"attention": "cam", "attention_scale": "minmax"},
    "cam, softmax": {"attention": "cam", "attention_scale": "softmax", "attention_temperature": 4.0},
}
STAGE2 = {name: ATTENTION[name] for name in ("none", "cam, sigmoid (the paper)", "cam, minmax")} | {
    "frozen-cam, sigmoid": {"attention": "frozen-cam"},
    "frozen-cam, minmax": {"attention": "frozen-cam", "attention_scale": "minmax"},
}
PCA, CLUSTERS, WIDTH = 256, 16, 64
_WORDS_FROM = 20_000  # descriptors


@dataclass(frozen=True, kw_only=True)
class Clips:
    """All clips of a set, their labels, and the rows of each split's parts."""

    actions: tuple[str, ...]
    frames_BTCHW: torch.Tensor
    labels_B: torch.Tensor
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]]
    pairs: list[tuple[int, int]]
    """Labels that only the order of frames tells apart."""


class _Rows:
    """Batches of some rows, in an order that the epoch decides."""

    def __init__(
        self, inputs: "Features | torch.Tensor", labels_B: torch.Tensor, rows: torch.Tensor, size: int
    ) -> None:
        self._inputs, self._labels, self._rows, self._size = inputs, labels_B, rows, size

    @property
    def num_steps(self) -> int:
        return -(-len(self._rows) // self._size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng(epoch).permutation(len(self._rows))
        for step in range(start_step, self.num_steps):
            rows = self._rows[torch.from_numpy(order[step * self._size : (step + 1) * self._size])]
            keys, labels = tuple(f"{row:06d}" for row in rows.tolist()), self._labels[rows]
            if isinstance(self._inputs, torch.Tensor):
                yield ClipBatch(
                    frames_BTCHW=self._inputs[rows], labels_B=labels, keys=keys, num_clips_in_global_batch=len(rows)
                )
            else:
                maps, activation = self._inputs
                assert activation is not None
                yield FeatureBatch(
                    features=Features(maps[rows], activation[rows]),
                    labels_B=labels,
                    keys=keys,
                    num_clips_in_global_batch=len(rows),
                )


def load_clips(source: str, splits: list[int], num_frames: int, crop: int) -> Clips:
    """Every clip in the centre view of evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        if source == "rendered":
            render_videos(Path(folder), 36, seed=0)
            videos = scan("rendered", Path(folder), "table", Path(folder) / "videos.csv")
        else:
            root = Path(source)
            videos = scan(root.name, root / "videos", "hmdb51", root / "splits_hmdb_format")
        frames = [
            crop_clip(
                torch.from_numpy(decode_clip(video.path, num_frames, 256).frames_THWC).permute(0, 3, 1, 2), None, crop
            )
            for video in videos.videos
        ]
    parts = {
        split: tuple(
            torch.tensor([row for row, video in enumerate(videos.videos) if video.splits[split - 1] == part])
            for part in ("train", "test")
        )
        for split in splits
    }
    pairs = [tuple(map(videos.actions.index, pair)) for pair in PAIRS] if source == "rendered" else []
    labels_B = torch.tensor([videos.actions.index(video.action) for video in videos.videos])
    return Clips(
        actions=tuple(videos.actions), frames_BTCHW=torch.stack(frames), labels_B=labels_B, parts=parts, pairs=pairs
    )


def build(options: dict[str, str], temporal: str, num_actions: int, seed: int) -> TaVlad:
    """The model before its words."""
    torch.manual_seed(seed)
    config = ModelConfig(
        trunk="efficientnet_lite0",
        temporal=temporal,
        num_clusters=CLUSTERS,
        gru_width=WIDTH,
        descriptor_pca=PCA,
        **options,
    )
    model = TaVlad(config, num_actions)
    load_weights(model.trunk, config.trunk, "imagenet")
    if model.attention_trunk is not None:
        model.attention_trunk.load_state_dict(model.trunk.state_dict())
    return model


@torch.no_grad()
def features_of(frames_BTCHW: torch.Tensor) -> Features:
    """The frozen trunk's maps before the last ReLU, and the activation of the winning class."""
    model = build(ATTENTION["cam, sigmoid (the paper)"], "sum", 2, 0).eval()
    clips = [model.features(clip[None]) for clip in frames_BTCHW]
    return Features(torch.cat([each.maps_BTDHW for each in clips]), torch.cat([each.activation_BTHW for each in clips]))


def learn(model: TaVlad, plan: StagePlan, train: _Rows, test: _Rows) -> Scores:
    """One stage; the scores of its last epoch."""
    reports: list[EpochReport] = []
    fit(model, plan, train, test, Listeners(on_epoch=reports.append))
    scores = reports[-1].scores
    assert scores is not None
    return scores


def maps_in_words(activation_BTHW: torch.Tensor) -> None:
    """How much each scale tells places apart: of a frame's weights the mean, and how far apart its places are."""
    raw_BTN = activation_BTHW.flatten(2)
    print(f"raw activation: positive at {(raw_BTN > 0).float().mean():.1%} of places, median {raw_BTN.median():.2f}")
    for name, options in ATTENTION.items():
        if options["attention"] != "none":
            config = ModelConfig(**options)
            weights = attention_weights(raw_BTN, config.attention_scale, config.attention_temperature)
            spread = weights.std(dim=-1) / weights.mean(dim=-1)
            print(f"{name}: mean {weights.mean():.3f}, deviation over a frame's places / its mean {spread.mean():.3f}")


def draw(path: Path, clips: Clips, activation_BTHW: torch.Tensor, trained: torch.Tensor) -> None:
    """The middle frame of some test clips, the untouched trunk's attention and the trained model's."""
    rows = clips.parts[min(clips.parts)][1]
    rows = rows[torch.linspace(0, len(rows) - 1, 8).long()]
    middle = clips.frames_BTCHW.shape[1] // 2
    path.write_bytes(
        figures.png(
            figures.attention_grid(
                clips.frames_BTCHW[rows, middle].permute(0, 2, 3, 1).numpy(),
                torch.sigmoid(activation_BTHW[rows, middle]).numpy(),
                trained[rows, middle].numpy(),
            )
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--splits", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--temporal", nargs="+", default=["gru", "sum"])
    parser.add_argument("--stage2", action="store_true")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    clips = load_clips(options.source, options.splits, options.frames, options.crop)
    features = features_of(clips.frames_BTCHW)
    assert features.activation_BTHW is not None
    maps_in_words(features.activation_BTHW)
    training = TrainingConfig(batch_size=16, precision="float32", crop=options.crop, evaluate_every=1000)
    stage1 = StageConfig(epochs=10, lr=1e-2, steps=options.steps)
    stage2 = StageConfig(epochs=2, lr=1e-4, trunk="last-block", fc=True, vlad=True)
    if options.pictures is not None:
        draw(options.pictures, clips, features.activation_BTHW, torch.sigmoid(features.activation_BTHW))
    rows: list[dict[str, object]] = []
    for split, (train, test) in clips.parts.items():
        for seed in range(options.seeds):
            samples = normalize(features.maps_BTDHW[train].flatten(3).transpose(2, 3), dim=-1).flatten(0, 2)
            chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:_WORDS_FROM]
            words = learn_words(samples[chosen].numpy(), build({}, "sum", 2, 0).config, seed)
            del samples
            for temporal in options.temporal:
                for name, fields in (STAGE2 if options.stage2 else ATTENTION).items():
                    model = build(fields, temporal, len(clips.actions), seed)
                    model.initialise(words)
                    settings = dataclasses.replace(training, seed=seed)
                    kept = [_Rows(features, clips.labels_B, part, 16) for part in (train, test)]
                    found = {"stage 1": learn(model, StagePlan(number=1, stage=stage1, training=settings), *kept)}
                    if options.stage2:
                        seen = [_Rows(clips.frames_BTCHW, clips.labels_B, part, 16) for part in (train, test)]
                        found["stage 2"] = learn(model, StagePlan(number=2, stage=stage2, training=settings), *seen)
                        if options.pictures is not None and fields["attention"] == "cam" and seed == 0:
                            with torch.no_grad():
                                trained = torch.cat([model.attention(clip[None]) for clip in clips.frames_BTCHW])
                            change = (trained - attention_of(model, features)).abs().mean()
                            print(f"{name}: attention changed by {change:.4f} on average in stage 2")
                            draw(options.pictures, clips, features.activation_BTHW, trained)
                    for stage, scores in found.items():
                        row = {"split": split, "seed": seed, "temporal": temporal, "attention": name, "stage": stage}
                        row |= {"top1": scores.top(1), "clips": len(scores.keys)}
                        if clips.pairs:
                            row["within pairs"] = statistics.mean(scores.within(pair) for pair in clips.pairs)
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    summarise(rows)


def attention_of(model: TaVlad, features: Features) -> torch.Tensor:
    """What the untouched trunk's activation gives under the model's scale."""
    assert features.activation_BTHW is not None
    weights = model._weigh(features.activation_BTHW.flatten(2))
    return weights.unflatten(2, tuple(features.activation_BTHW.shape[2:]))


def summarise(rows: list[dict[str, object]]) -> None:
    """Mean over all splits' clips, and its deviation over the seeds."""
    print("| temporal | attention | stage | top-1, % | within pairs, % |\n|---|---|---|---|---|")
    kinds = dict.fromkeys((row["temporal"], row["attention"], row["stage"]) for row in rows)
    for kind in kinds:
        own = [row for row in rows if (row["temporal"], row["attention"], row["stage"]) == kind]
        cells: list[str] = []
        for measure in ("top1", "within pairs"):
            by_seed = [
                100 * np.average([row[measure] for row in each], weights=[row["clips"] for row in each])
                for seed in {row["seed"] for row in own}
                if (each := [row for row in own if row["seed"] == seed]) and measure in each[0]
            ]
            cells.append(f"{np.mean(by_seed):.1f} ± {np.std(by_seed):.1f}" if by_seed else "")
        print(f"| {' | '.join(map(str, kind))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
