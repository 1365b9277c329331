"""Attention pictures: one grid and one video a clip, of the trained model beside its untouched trunk."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ray_jobs.attention import draw_attention
from ray_jobs.console import Console
from shards.render import encode_video
from tavlad.backbone import build_trunk
from tavlad.checkpoint import ModelCard, save_checkpoint
from tavlad.config import ModelConfig
from tavlad.figures import attention_overlay
from tavlad.model import TaVlad


def _video(path: Path, seed: int) -> Path:
    frames_THWC = np.random.default_rng(seed).integers(0, 256, (8, 64, 80, 3), dtype=np.uint8)
    path.write_bytes(encode_video(frames_THWC, 8))
    return path


def test_grid_and_videos_show_the_trained_model_beside_its_untouched_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pth"
    torch.save(build_trunk("resnet18").state_dict(), weights)
    config = ModelConfig(trunk="resnet18", weights=str(weights), num_clusters=2, gru_width=3)
    torch.manual_seed(1)
    model = TaVlad(config, 2)
    model.trunk.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        model.trunk.classifier.weight.neg_()
        model.trunk.classifier.bias.neg_()
    card = ModelCard(model=config, actions=("a", "b"), num_frames=4, short_side=64, crop=64, precision="float32")
    save_checkpoint(tmp_path / "model", model, card)
    videos = [_video(tmp_path / f"{name}.mp4", seed) for seed, name in enumerate("xyz")]
    drawn = draw_attention("", str(tmp_path / "model"), videos, tmp_path / "out", Console())
    assert {path.parent for path in (drawn.grid, *drawn.overlays)} == {tmp_path / "out"}
    assert imread(drawn.grid).shape[1] > 300
    assert [path.name for path in drawn.overlays] == ["00_x.mp4", "01_y.mp4", "02_z.mp4"]
    with av.open(str(drawn.overlays[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (len(frames), frames[0].shape) == (4, (64, 3 * 64, 3)), "frame, ImageNet, trained"
    assert drawn.mean_before != pytest.approx(drawn.mean_after, abs=1e-4)
    assert 0 <= drawn.above_half_after <= 1


def test_model_without_activation_maps_is_named(tmp_path: Path) -> None:
    config = ModelConfig(trunk="vgg16", weights="none", attention="none", temporal="sum", num_clusters=2)
    card = ModelCard(model=config, actions=("a", "b"), num_frames=4, short_side=64, crop=64, precision="float32")
    save_checkpoint(tmp_path / "model", TaVlad(config, 2), card)
    with pytest.raises(ValueError, match="has trunk vgg16, which has no class activation maps"):
        draw_attention("", str(tmp_path / "model"), [], tmp_path, Console())


def test_overlay_is_half_frame_half_viridis_on_a_fixed_scale() -> None:
    frames = np.full((2, 5, 8, 3), 100, np.uint8)
    low, high = np.zeros((2, 1, 2), np.float32), np.ones((2, 1, 2), np.float32)
    shown = attention_overlay(frames, [low, high])
    assert shown.shape == (2, 4, 24, 3)
    assert (shown[:, :, :8] == 100).all()
    viridis = {"low": (68, 1, 84), "high": (253, 231, 37)}  # matplotlib's ends
    for columns, end in ((slice(8, 16), "low"), (slice(16, 24), "high")):
        expected = (100 + np.array(viridis[end])) / 2
        assert np.abs(shown[:, :, columns].astype(float) - expected).max() <= 1
