"""A model that answers differently for different clips, without having been trained, and real clips for it."""

from pathlib import Path

import pytest
import torch

from shards.transforms import crop_clip
from shards.video import decode_clip
from tavlad.backbone import load_weights
from tavlad.checkpoint import ModelCard, save_checkpoint
from tavlad.config import ModelConfig
from tavlad.model import TaVlad


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model on a real trunk, which answers differently for different clips."""
    torch.manual_seed(0)
    config = ModelConfig(trunk="efficientnet_lite0", weights="none", num_clusters=4, gru_width=8)
    card = ModelCard(
        model=config, actions=("clap", "jump", "wave"), num_frames=4, short_side=40, crop=32, precision="bf16"
    )
    model = TaVlad(config, len(card.actions))
    load_weights(model.trunk, config.trunk, "imagenet")
    torch.nn.init.normal_(model.vlad.weight, std=3)
    torch.nn.init.normal_(model.classifier.weight, std=3)
    directory = tmp_path_factory.mktemp("small") / "model"
    save_checkpoint(directory, model, card)
    return directory


@pytest.fixture(scope="session")
def real_clips(shared_data: Path) -> torch.Tensor:
    """Four real clips as `small_model` takes them, uint8 (4, 4, 3, 32, 32)."""
    videos = sorted((shared_data / "weizmann" / "videos").rglob("*.avi"))[::25]
    clips = [torch.from_numpy(decode_clip(video, 4, 40).frames_THWC).permute(0, 3, 1, 2) for video in videos]
    return torch.stack([crop_clip(clip, None, 32) for clip in clips])
