"""How many clips change their top-1 between bf16 and float32, end to end: trunk, VLAD, GRU, classifier.

python benchmarks/precision.py VIDEOS [--crop 224] [--steps 200]

VIDEOS is a folder of videos, one folder per action. TA-VLAD's head is trained on bf16 maps of every second clip (stage
1, the pretrained EfficientNet-Lite0 frozen); then all clips are scored in both precisions.
"""

import argparse
import json
from pathlib import Path

import torch

from shards.transforms import crop_clip
from shards.video import decode_clip
from tavlad.backbone import load_weights
from tavlad.codebook import learn_words
from tavlad.config import ModelConfig, StageConfig, TrainingConfig
from tavlad.model import FrameMaps, TaVlad
from tavlad.optim import build_optimizer, choose_trained
from tavlad.parallel import autocast

NUM_FRAMES = 25
_CPU = torch.device("cpu")


def _clip(path: Path, crop: int) -> torch.Tensor:
    frames_THWC = decode_clip(path, NUM_FRAMES, 256).frames_THWC
    return crop_clip(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2), None, crop)[None]


def _stack(maps: list[FrameMaps]) -> FrameMaps:
    attention = [each.attention_BTN for each in maps if each.attention_BTN is not None]
    return FrameMaps(
        descriptors_BTND=torch.cat([each.descriptors_BTND for each in maps]), attention_BTN=torch.cat(attention)
    )


@torch.no_grad()
def _encode(model: TaVlad, paths: list[Path], crop: int, precision: str) -> list[FrameMaps]:
    with autocast(_CPU, precision):
        return [model.encode(_clip(path, crop)) for path in paths]


def _train(model: TaVlad, maps: list[FrameMaps], labels: torch.Tensor, steps: int) -> None:
    stage, training = StageConfig(epochs=1, lr=1e-2), TrainingConfig()
    choose_trained(model, stage)
    optimizer = build_optimizer(model, stage, training)
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(maps), generator=generator)[: training.batch_size]
        with autocast(_CPU, "bf16"):
            logits = model.classify(_stack([maps[row] for row in rows.tolist()]))
        loss = torch.nn.functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    paths = sorted(path for path in options.videos.glob("*/*") if path.is_file())
    actions = sorted({path.parent.name for path in paths})
    labels = torch.tensor([actions.index(path.parent.name) for path in paths])
    torch.manual_seed(0)
    config = ModelConfig(trunk="efficientnet_lite0", num_clusters=16, gru_width=64)
    model = TaVlad(config, len(actions)).eval()
    load_weights(model.trunk, config.trunk, "imagenet")
    half = _encode(model, paths, options.crop, "bf16")
    samples = torch.cat([maps.descriptors_BTND[0, ::8].flatten(0, 1) for maps in half[::2]])
    model.initialise(learn_words(samples.float().numpy(), config, seed=0))
    with torch.enable_grad():
        _train(model, half[::2], labels[::2], options.steps)
    with autocast(_CPU, "bf16"):
        scores_half = torch.cat([model.classify(maps) for maps in half]).softmax(dim=1)
    del half
    scores_full = torch.cat(
        [model.classify(maps) for path in paths for maps in _encode(model, [path], options.crop, "float32")]
    )
    scores_full = scores_full.softmax(dim=1)
    changed = scores_half.argmax(dim=1) != scores_full.argmax(dim=1)
    held_out = torch.ones(len(paths), dtype=torch.bool)
    held_out[::2] = False
    facts = {
        "clips": len(paths),
        "top-1 changed": int(changed.sum()),
        "of them held out": int((changed & held_out).sum()),
        "held-out top-1, bf16": float((scores_half.argmax(1) == labels)[held_out].float().mean()),
        "held-out top-1, float32": float((scores_full.argmax(1) == labels)[held_out].float().mean()),
        "largest change of a probability": float((scores_half - scores_full).abs().max()),
    }
    for name, value in facts.items():
        print(f"| {name} | {value:.3g} |")
    print(json.dumps(facts | {"crop": options.crop, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
