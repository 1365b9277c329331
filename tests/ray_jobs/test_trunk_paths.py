"""Whatever the recipe, a trunk gives the same maps however they are come by: as it is, frozen, cut below its last block
while that learns, and stored."""

import importlib.util
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ray_jobs.feature_batches import entries_of
from ray_jobs.features import Extractor
from tavlad.clip import FeatureKind, Features
from tavlad.config import ModelConfig, StageConfig
from tavlad.frozen import normalise
from tavlad.model import TaVlad
from tavlad.optim import choose_trained

has_timm = importlib.util.find_spec("timm") is not None
TRUNKS = ["resnet18", "efficientnet_lite0", "squeezenet1_1", "googlenet", "vgg16", "r3d_18"]
TIMM = ["resnet18", "regnetx_002", "tf_efficientnet_lite0", "mnasnet_small", "test_byobnet", "cspnext_tiny"]
_CPU = torch.device("cpu")


@st.composite
def _recipes(draw: st.DrawFn) -> tuple[ModelConfig, StageConfig]:
    trunk = draw(st.sampled_from(TRUNKS + [f"timm:{name}" for name in TIMM if has_timm]))
    has_maps = trunk not in ("vgg16", "r3d_18")
    config = ModelConfig(
        trunk=trunk,
        weights="none",
        temporal="conv3d" if trunk == "r3d_18" else draw(st.sampled_from(["sum", "gru"])),
        attention=draw(st.sampled_from(["none", "cam", "frozen-cam"])) if has_maps else "none",
        descriptor=draw(st.sampled_from(["pre_relu", "post_relu"])),
        num_clusters=2,
        gru_width=3,
    )
    learns = draw(st.sampled_from(["last-block", "last-block-without-downsample"]))
    return config, StageConfig(epochs=1, lr=1e-3, trunk=learns, fc=has_maps and draw(st.booleans()))


def _model(config: ModelConfig, seed: int) -> TaVlad:
    """With batch norms that have something to say."""
    torch.manual_seed(seed)
    model = TaVlad(config, 3).eval()
    for module in model.trunk.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    if model.attention_trunk is not None:
        model.attention_trunk.load_state_dict(model.trunk.state_dict())
    return model


@torch.no_grad()
def _plain(model: TaVlad, frames_BTCHW: Tensor) -> Tensor:
    """The trunk's maps, a place without anything that makes it fast."""
    trunk, (num_clips, num_frames) = model.trunk, frames_BTCHW.shape[:2]
    images = frames_BTCHW.transpose(1, 2) if trunk.joins_frames else frames_BTCHW.flatten(0, 1)
    maps = trunk.maps(normalise(trunk, images, torch.float32))
    chosen = maps.pre_relu_BDHW if model.described_map == "pre_relu" else maps.post_relu_BDHW
    return chosen.transpose(1, 2) if trunk.joins_frames else chosen.unflatten(0, (num_clips, num_frames))


def _stored(model: TaVlad, frames_BTCHW: Tensor, kind: FeatureKind) -> Features:
    """As they come back from a feature set."""
    extracted = Extractor(model, _CPU, "float32", kind)(frames_BTCHW)
    entries = list(entries_of(extracted, np.dtype("float32")))
    activations = [torch.from_numpy(each.activation_THW) for each in entries if each.activation_THW is not None]
    maps_BTDHW = torch.stack([torch.from_numpy(each.map_TDHW) for each in entries])
    return Features(maps_BTDHW, torch.stack(activations) if activations else None, kind)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(recipe=_recipes(), side=st.sampled_from([96, 112]), num_frames=st.integers(1, 2), seed=st.integers(0, 99))
def test_paths_of_a_trunk_give_the_same_maps(
    recipe: tuple[ModelConfig, StageConfig], side: int, num_frames: int, seed: int
) -> None:
    config, stage = recipe
    model = _model(config, seed)
    frames_BTCHW = torch.randint(0, 256, (2, num_frames, 3, side, side), dtype=torch.uint8)
    for factor in (1.0, 1.5):  # also after the last block has learned
        with torch.no_grad():
            model.trunk.last_block_convs()[0].weight.mul_(factor)
        expected = _plain(model, frames_BTCHW)
        found: dict[str, Any] = {}
        model.requires_grad_(False)
        found["frozen"] = model.features(frames_BTCHW).maps_BTDHW
        choose_trained(model, stage)
        learning = model.features(frames_BTCHW).maps_BTDHW
        assert learning.requires_grad
        found["learning"] = learning.detach()
        if not model.trunk.joins_frames:
            found["stored"] = _stored(model, frames_BTCHW, "last").maps_BTDHW
        if model.trunk.has_early_map:
            early = _stored(model, frames_BTCHW, "early")
            found["stored below"] = model._completed(early).maps_BTDHW.detach()
        for path, maps in found.items():
            error = (maps - expected).abs().max() / expected.abs().max()
            assert error < 1e-4, f"{path}, of {config.trunk}"
