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
from tavlad.frame_heads import SoftAttentionLstm, mean_of_probabilities, random_frame
from tavlad.temporal import gru_states, sum_over_time
from tavlad.vlad import DescriptorPca, VisualWords, Vlad

_EPS = 1e-8  # under the power, whose slope at 0 is infinite
_FRAMES_PER_PASS = 64  # of a trunk without gradients: bounds its memory whatever the batch


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameMaps:
    """What the trunk makes of a batch of clips: all that the head needs."""

    descriptors_BTND: Float[Tensor, "B T N D"]
    """Descriptors of unit length, one a place; without VLAD the map after the last ReLU as it is."""
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
        self.pca = self.vlad = self.gru = self.lstm = None
        width = size
        if config.temporal == "lstm-attention":
            self.lstm = SoftAttentionLstm(size, config.gru_width)
            width = config.gru_width
        elif config.has_vlad:
            if config.descriptor_pca:
                self.pca = DescriptorPca(size, config.descriptor_pca)
                size = config.descriptor_pca
            self.vlad = Vlad(config.num_clusters, size)
            if config.temporal == "gru":
                self.gru = nn.GRU(size, config.gru_width, batch_first=True)
            width = config.num_clusters * (size if self.gru is None else config.gru_width)
        self.dropout = nn.Dropout2d(config.dropout) if config.dropout_place == "cluster" else nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, num_actions)

    def initialise(self, words: VisualWords) -> None:
        """Take over the visual words: centres, assignment and PCA. Nothing to do for a model without VLAD."""
        if self.vlad is not None:
            self.vlad.initialise(words.centres_KD, self.config.alpha)
        if self.pca is not None:
            assert words.pca is not None, "the words of a model with a PCA were learned behind it"
            self.pca.mean.copy_(words.pca.mean_D)
            self.pca.components.copy_(words.pca.components_PD)

    def train(self, mode: bool = True) -> "TaVlad":
        """Switch dropout; the trunks stay in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        if self.attention_trunk is not None:
            self.attention_trunk.eval()
        return self

    def forward(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[Tensor, "B A"]:
        """Logits of each action."""
        if self.training and self.config.temporal == "single-frame":
            frames_BTCHW = random_frame(frames_BTCHW)
        logits_BA = self.classify(self.encode(frames_BTCHW))
        if self.config.mirror_at_test and not self.training:
            logits_BA = (logits_BA + self.classify(self.encode(frames_BTCHW.flip(-1)))) / 2
        return logits_BA

    def encode(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> FrameMaps:
        """Descriptors and attention of every frame (steps 1-3)."""
        num_clips, num_frames = frames_BTCHW.shape[:2]
        images = frames_BTCHW.flatten(0, 1)
        maps = _run_trunk(self.trunk, images)
        dtype = self.classifier.weight.dtype
        if self.vlad is None:
            places_BTND = _places(maps.post_relu_BDHW, num_clips, num_frames).to(dtype)
            return FrameMaps(descriptors_BTND=places_BTND, attention_BTN=None)
        descriptors = maps.pre_relu_BDHW if self.config.descriptor == "pre_relu" else maps.post_relu_BDHW
        x_BTND = normalize(_places(descriptors, num_clips, num_frames).to(dtype), dim=-1, eps=1e-12)
        return FrameMaps(descriptors_BTND=x_BTND, attention_BTN=self._attend(images, maps, num_clips, num_frames))

    def classify(self, maps: FrameMaps) -> Float[Tensor, "B A"]:
        """Logits from the trunk's maps (steps 4-7)."""
        if self.vlad is None:
            return self._score_frames(maps.descriptors_BTND)
        x_BTND = maps.descriptors_BTND if self.pca is None else self.pca(maps.descriptors_BTND)
        vlad_BTKD = self.vlad(x_BTND, maps.attention_BTN)
        if self.config.dropout_place == "frame":
            vlad_BTKD = self.dropout(vlad_BTKD)
        clip_BKU = normalize(self._over_time(vlad_BTKD).to(x_BTND.dtype), dim=-1, eps=1e-12)  # intra-normalisation
        if self.config.dropout_place == "cluster":
            clip_BKU = self.dropout(clip_BKU.unsqueeze(-1)).squeeze(-1)
        if self.config.power != 1:
            clip_BKU = clip_BKU.sign() * (clip_BKU.abs() + _EPS).pow(self.config.power)
        video = normalize(clip_BKU.flatten(1), dim=-1, eps=1e-12)
        if self.config.dropout_place == "video":
            video = self.dropout(video)
        with torch.autocast(video.device.type, enabled=False):
            return self.classifier(video)

    def _over_time(self, vlad_BTKD: Tensor) -> Tensor:
        """(B, T, K, D) → (B, K, U), or (B, K, D) without a GRU."""
        if self.gru is None:
            return sum_over_time(vlad_BTKD)
        # In bf16 a state depends on how many clips are computed at once; scores must not.
        device = vlad_BTKD.device.type
        in_bf16 = self.training and torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=in_bf16):
            return gru_states(vlad_BTKD, self.gru, self.config.temporal_readout)

    def _score_frames(self, places_BTND: Tensor) -> Tensor:
        """Logits from the frames' own scores, (B, T, N, D) → (B, A)."""
        with torch.autocast(places_BTND.device.type, enabled=False):
            features_BTX = places_BTND.mean(dim=2) if self.lstm is None else self.lstm(places_BTND)
            logits_BTA = self.classifier(self.dropout(features_BTX))
            if self.config.temporal == "single-frame":
                return mean_of_probabilities(logits_BTA)
            return logits_BTA.mean(dim=1)

    @torch.no_grad()
    def attention(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T h w"]:
        """The attention maps as pictures, in [0, 1]; of the trunk itself for a model that does not use them."""
        num_clips, num_frames = frames_BTCHW.shape[:2]
        images = frames_BTCHW.flatten(0, 1)
        maps = _run_trunk(self.trunk, images)
        attention_BTN = self._attend(images, maps, num_clips, num_frames)
        if attention_BTN is None:
            features_BTND = _places(maps.post_relu_BDHW, num_clips, num_frames)
            attention_BTN = self._weigh(features_BTND, self.trunk)
        return attention_BTN.unflatten(2, tuple(maps.post_relu_BDHW.shape[2:]))

    def _attend(self, images: Tensor, maps: TrunkMaps, num_clips: int, num_frames: int) -> Tensor | None:
        if self.config.attention == "none":
            return None
        trunk = self.trunk
        if self.attention_trunk is not None:
            trunk = self.attention_trunk
            maps = _run_trunk(trunk, images)
        return self._weigh(_places(maps.post_relu_BDHW, num_clips, num_frames), trunk)

    def _weigh(self, features_BTND: Tensor, trunk: TrunkNetwork) -> Tensor:
        scale, temperature = self.config.attention_scale, self.config.attention_temperature
        return top_down_attention(features_BTND, trunk.classifier, scale, temperature)


def _places(map_BDHW: Tensor, num_clips: int, num_frames: int) -> Tensor:
    """(B·T, D, H, W) → (B, T, N, D)."""
    return map_BDHW.flatten(2).transpose(1, 2).unflatten(0, (num_clips, num_frames))


def _run_trunk(trunk: TrunkNetwork, images_BCHW: UInt8[Tensor, "F 3 H W"]) -> TrunkMaps:
    """The trunk's maps of 0-255 images; in bounded passes where no gradient is wanted."""
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
