"""TA-VLAD: frames → features → attention → VLAD → GRU → logits (METHOD, "One clip, forward")."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from tavlad.attention import attend, class_activation
from tavlad.backbone import TrunkMaps, TrunkNetwork, build_trunk
from tavlad.clip import Features
from tavlad.config import ModelConfig
from tavlad.frozen import FrozenTrunk, normalise
from tavlad.temporal import last_states, sum_over_time
from tavlad.vlad import Vlad


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
        self._frozen_trunk = FrozenTrunk(self.trunk)
        self._frozen_attention_trunk = FrozenTrunk(self.attention_trunk) if self.attention_trunk is not None else None
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

    def forward(self, inputs: UInt8[Tensor, "B T 3 H W"] | Features) -> Float[Tensor, "B A"]:
        """Logits of each action, from frames or from the features of a trunk that did not learn."""
        features = inputs if isinstance(inputs, Features) else self.features(inputs)
        return self.classify(self.describe(features))

    def features(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"], *, with_activation: bool | None = None) -> Features:
        """The trunk's share of the work (steps 1, 2). The activation is left out where the model has no attention,
        unless it is asked for."""
        if with_activation is None:
            with_activation = self.config.attention != "none"
        num_clips, num_frames = frames_BTCHW.shape[:2]
        images = frames_BTCHW.flatten(0, 1)
        maps = self._run(self.trunk, self._frozen_trunk, images, num_frames)
        chosen = maps.pre_relu_BDHW if self.config.descriptor == "pre_relu" else maps.post_relu_BDHW
        activation_BTHW = None
        if with_activation:
            trunk, seen = self.trunk, maps
            if self.attention_trunk is not None:
                assert self._frozen_attention_trunk is not None
                trunk = self.attention_trunk
                seen = self._run(trunk, self._frozen_attention_trunk, images, num_frames)
            activation_BTN = class_activation(
                _places(seen.post_relu_BDHW.unflatten(0, (num_clips, num_frames))), trunk.classifier
            )
            activation_BTHW = activation_BTN.unflatten(2, tuple(seen.post_relu_BDHW.shape[2:]))
        return Features(chosen.unflatten(0, (num_clips, num_frames)), activation_BTHW)

    def describe(self, features: Features) -> FrameMaps:
        """Descriptors and attention of every place (steps 2, 3)."""
        x_BTND = _places(features.maps_BTDHW).to(self.vlad.weight.dtype)
        attention_BTN = None
        if self.config.attention != "none":
            assert features.activation_BTHW is not None, "a model with attention is given its activation"
            attention_BTN = attend(features.activation_BTHW.flatten(2))
        return FrameMaps(descriptors_BTND=normalize(x_BTND, dim=-1, eps=1e-12), attention_BTN=attention_BTN)

    def encode(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> FrameMaps:
        """Descriptors and attention of frames."""
        return self.describe(self.features(frames_BTCHW))

    def classify(self, maps: FrameMaps) -> Float[Tensor, "B A"]:
        """Logits from the trunk's maps (steps 4-7)."""
        vlad_BTKD = self.vlad(maps.descriptors_BTND, maps.attention_BTN)
        if self.gru is None:
            clip_BKU = sum_over_time(vlad_BTKD)
        else:
            # In bf16 a state depends on how many clips are computed at once; scores must not.
            device = vlad_BTKD.device.type
            in_bf16 = self.training and torch.is_autocast_enabled(device)
            clip_BKU = last_states(vlad_BTKD, self.gru, torch.get_autocast_dtype(device) if in_bf16 else None)
        clip_BKU = normalize(clip_BKU.to(self.vlad.weight.dtype), dim=-1, eps=1e-12)  # intra-normalisation
        video = normalize(clip_BKU.flatten(1), dim=-1, eps=1e-12)
        with torch.autocast(video.device.type, enabled=False):
            return self.classifier(self.dropout(video))

    @torch.no_grad()
    def attention(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T h w"]:
        """The attention maps as pictures, in [0, 1]; of the trunk itself for a model that does not use them."""
        activation_BTHW = self.features(frames_BTCHW, with_activation=True).activation_BTHW
        assert activation_BTHW is not None
        return attend(activation_BTHW)

    def _run(self, trunk: TrunkNetwork, frozen: FrozenTrunk, images_BCHW: Tensor, num_frames: int) -> TrunkMaps:
        """The trunk's maps of 0-255 images; without gradients below the first part that learns."""
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trunk.parameters())
        if torch.compiler.is_compiling():  # an exported graph is the plain one
            return trunk.maps(normalise(trunk, images_BCHW, self.vlad.weight.dtype))
        if not learns:
            return frozen.maps(images_BCHW, num_frames)
        return trunk.late(frozen.early(images_BCHW, num_frames))


def _places(map_BTDHW: Float[Tensor, "B T D h w"]) -> Float[Tensor, "B T N D"]:
    return map_BTDHW.flatten(3).transpose(2, 3)
