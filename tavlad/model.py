"""TA-VLAD: frames → features → attention → VLAD → GRU → logits (METHOD, "One clip, forward")."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from tavlad.attention import top_down_attention
from tavlad.backbone import TrunkMaps, TrunkNetwork, build_trunk
from tavlad.config import ModelConfig
from tavlad.temporal import last_states, sum_over_time
from tavlad.vlad import Vlad

_FRAMES_PER_PASS = 64  # of a trunk without gradients: bounds its memory whatever the batch


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameMaps:
    """What the trunk makes of a batch of clips: all that the head needs."""

    descriptors_BTND: Float[Tensor, "B T N D"]
    """Descriptors of unit length, one a place."""
    attention_BTN: Float[Tensor, "B T N"] | None
    """Top-down attention in [0, 1], or None for a model without it."""


class TaVlad(nn.Module):
    """The network of the paper and, by its switches, the ones it is compared with.

    Batch normalisation always uses its running statistics and never updates them, in training too.
    """

    def __init__(self, config: ModelConfig, num_actions: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config.trunk)
        size = self.trunk.feature_size
        self.attention_trunk = copy.deepcopy(self.trunk) if config.attention == "frozen-cam" else None
        self.vlad = Vlad(config.num_clusters, size)
        self.gru = nn.GRU(size, config.gru_width, batch_first=True) if config.temporal == "gru" else None
        width = size if self.gru is None else config.gru_width
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.num_clusters * width, num_actions)

    def train(self, mode: bool = True) -> "TaVlad":
        """Switch dropout; the trunks stay in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        if self.attention_trunk is not None:
            self.attention_trunk.eval()
        return self

    def forward(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[Tensor, "B A"]:
        """Logits of each action."""
        return self.classify(self.encode(frames_BTCHW))

    def encode(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> FrameMaps:
        """Descriptors and attention of every frame (steps 1-3)."""
        num_clips, num_frames = frames_BTCHW.shape[:2]
        images = frames_BTCHW.flatten(0, 1)
        maps = _run_trunk(self.trunk, images)
        descriptors = maps.pre_relu_BDHW if self.config.descriptor == "pre_relu" else maps.post_relu_BDHW
        descriptors_BTND = _places(descriptors, num_clips, num_frames)
        x_BTND = normalize(descriptors_BTND.to(self.vlad.weight.dtype), dim=-1, eps=1e-12)
        return FrameMaps(descriptors_BTND=x_BTND, attention_BTN=self._attend(images, maps, num_clips, num_frames))

    def classify(self, maps: FrameMaps) -> Float[Tensor, "B A"]:
        """Logits from the trunk's maps (steps 4-7)."""
        vlad_BTKD = self.vlad(maps.descriptors_BTND, maps.attention_BTN)
        if self.gru is None:
            clip_BKU = sum_over_time(vlad_BTKD)
        else:
            # In bf16 a state depends on how many clips are computed at once; scores must not.
            device = vlad_BTKD.device.type
            in_bf16 = self.training and torch.is_autocast_enabled(device)
            with torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=in_bf16):
                clip_BKU = last_states(vlad_BTKD, self.gru)
        clip_BKU = normalize(clip_BKU.to(self.vlad.weight.dtype), dim=-1, eps=1e-12)  # intra-normalisation
        video = normalize(clip_BKU.flatten(1), dim=-1, eps=1e-12)
        with torch.autocast(video.device.type, enabled=False):
            return self.classifier(self.dropout(video))

    @torch.no_grad()
    def attention(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T h w"]:
        """The attention maps as pictures, in [0, 1]; of the trunk itself for a model that does not use them."""
        num_clips, num_frames = frames_BTCHW.shape[:2]
        images = frames_BTCHW.flatten(0, 1)
        maps = _run_trunk(self.trunk, images)
        attention_BTN = self._attend(images, maps, num_clips, num_frames)
        if attention_BTN is None:
            features_BTND = _places(maps.post_relu_BDHW, num_clips, num_frames)
            attention_BTN = top_down_attention(features_BTND, self.trunk.classifier)
        return attention_BTN.unflatten(2, tuple(maps.post_relu_BDHW.shape[2:]))

    def _attend(self, images: Tensor, maps: TrunkMaps, num_clips: int, num_frames: int) -> Tensor | None:
        if self.config.attention == "none":
            return None
        trunk = self.trunk
        if self.attention_trunk is not None:
            trunk = self.attention_trunk
            maps = _run_trunk(trunk, images)
        return top_down_attention(_places(maps.post_relu_BDHW, num_clips, num_frames), trunk.classifier)


def _places(map_BDHW: Tensor, num_clips: int, num_frames: int) -> Tensor:
    """(B·T, D, H, W) → (B, T, N, D)."""
    return map_BDHW.flatten(2).transpose(1, 2).unflatten(0, (num_clips, num_frames))


def _run_trunk(trunk: TrunkNetwork, images_BCHW: UInt8[Tensor, "F 3 H W"]) -> TrunkMaps:
    """The trunk's maps of 0-255 images; in bounded passes where no gradient is wanted."""
    if torch.compiler.is_exporting():  # a program of any batch size has no loop over its passes
        return _normalise_and_run(trunk, images_BCHW)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trunk.parameters()):
        return _normalise_and_run(trunk, images_BCHW)
    with torch.no_grad():
        passes = [_normalise_and_run(trunk, part) for part in images_BCHW.split(_FRAMES_PER_PASS)]
    return TrunkMaps(
        pre_relu_BDHW=torch.cat([each.pre_relu_BDHW for each in passes]),
        post_relu_BDHW=torch.cat([each.post_relu_BDHW for each in passes]),
    )


def _normalise_and_run(trunk: TrunkNetwork, images_BCHW: UInt8[Tensor, "F 3 H W"]) -> TrunkMaps:
    mean, std = trunk.mean_C[:, None, None], trunk.std_C[:, None, None]
    normalised = (images_BCHW.to(mean.dtype).div_(255) - mean).div_(std)
    return trunk.maps(normalised.contiguous(memory_format=torch.channels_last))
