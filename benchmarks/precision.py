"""How many clips change their top-1 when the trunk is computed in less than float32, end to end: trunk, VLAD, GRU,
classifier.

python benchmarks/precision.py VIDEOS... [--crop 224] [--steps 100] [--seeds 3]

Each VIDEOS is a folder of videos, one folder per action. For each, TA-VLAD's head is trained on bf16 maps of every
second clip (stage 1, the pretrained EfficientNet-Lite0 frozen) with each seed; then all clips are scored with the trunk
in float32 and in the other ways of `WAYS`, the head always as in evaluation.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from shards.transforms import crop_clip
from shards.video import decode_clip
from tavlad.backbone import load_weights
from tavlad.clip import Features
from tavlad.codebook import learn_words
from tavlad.config import ModelConfig, StageConfig, TrainingConfig
from tavlad.model import FrameMaps, TaVlad
from tavlad.optim import build_optimizer, choose_trained
from tavlad.parallel import autocast

NUM_FRAMES = 25
WAYS = ("float32", "bf16", "bf16, last block float32", "float32, last block bf16")
_CPU = torch.device("cpu")


def _clip(path: Path, crop: int) -> torch.Tensor:
    frames_THWC = decode_clip(path, NUM_FRAMES, 256).frames_THWC
    return crop_clip(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2), None, crop)[None]


def _features(model: TaVlad, frames: torch.Tensor, way: str) -> Features:
    """The trunk's maps and activation of one clip, computed in one of `WAYS`."""
    early, _, late = way.partition(", last block ")
    with autocast(_CPU, early):
        if not late:
            return model.features(frames)
        below = model._frozen_trunk.early(frames[0], NUM_FRAMES)
    dtype = torch.bfloat16 if late == "bf16" else torch.float32
    maps = model._frozen_trunk._current(dtype, "maps").trunk.late(below.to(dtype))
    from tavlad.attention import class_activation

    post = maps.post_relu_BDHW[None].float()
    activation = class_activation(post.flatten(3).transpose(2, 3), model.trunk.classifier)
    return Features(maps.pre_relu_BDHW[None], activation.unflatten(2, post.shape[3:]))


def _stack(maps: list[FrameMaps]) -> FrameMaps:
    attention = [each.attention_BTN for each in maps if each.attention_BTN is not None]
    return FrameMaps(
        descriptors_BTND=torch.cat([each.descriptors_BTND for each in maps]), attention_BTN=torch.cat(attention)
    )


def _train(model: TaVlad, maps: list[FrameMaps], labels: torch.Tensor, steps: int, seed: int) -> None:
    stage, training = StageConfig(epochs=1, lr=1e-2), TrainingConfig()
    choose_trained(model, stage)
    optimizer = build_optimizer(model, stage, training)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(maps), generator=generator)[: training.batch_size]
        logits = model.classify(_stack([maps[row] for row in rows.tolist()]))
        loss = torch.nn.functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def _build(seed: int, num_actions: int) -> TaVlad:
    torch.manual_seed(seed)
    config = ModelConfig(trunk="efficientnet_lite0", num_clusters=16, gru_width=64)
    model = TaVlad(config, num_actions).eval()
    load_weights(model.trunk, config.trunk, "imagenet")
    return model


@torch.no_grad()
def measure(videos: Path, crop: int, steps: int, seeds: int) -> list[dict[str, object]]:
    """One row a seed and a way."""
    paths = sorted(path for path in videos.glob("*/*") if path.is_file())
    actions = sorted({path.parent.name for path in paths})
    labels = torch.tensor([actions.index(path.parent.name) for path in paths])
    model = _build(0, len(actions))
    maps: dict[str, list[FrameMaps]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for path in paths:
        frames = _clip(path, crop)
        for way in WAYS:
            started = time.process_time()
            features = _features(model, frames, way)
            seconds[way] += time.process_time() - started
            maps[way].append(model.describe(features))
    rows: list[dict[str, object]] = []
    for seed in range(seeds):
        model = _build(seed, len(actions))
        half = maps["bf16"][::2]
        samples = torch.cat([each.descriptors_BTND[0, ::8].flatten(0, 1) for each in half])
        model.initialise(learn_words(samples.numpy(), model.config, seed=seed))
        with torch.enable_grad():
            _train(model, half, labels[::2], steps, seed)
        scores = {way: torch.cat([model.classify(each) for each in maps[way]]).softmax(dim=1) for way in WAYS}
        for way in WAYS:
            changed = scores[way].argmax(dim=1) != scores["float32"].argmax(dim=1)
            rows.append(
                {
                    "set": videos.parent.name,
                    "seed": seed,
                    "way": way,
                    "clips": len(paths),
                    "changed": int(changed.sum()),
                    "held-out top-1": float((scores[way].argmax(1) == labels)[1::2].float().mean()),
                    "largest change": float((scores[way] - scores["float32"]).abs().max()),
                    "CPU s a clip": seconds[way] / len(paths),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = [row for videos in options.videos for row in measure(videos, options.crop, options.steps, options.seeds)]
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    print(json.dumps({"rows": rows, "crop": options.crop, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
