"""TA-VLAD: frames → features → attention → VLAD → GRU → logits (METHOD, "One clip, forward")."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from tavlad.attention import attention_weights, class_activation
from tavlad.backbone import TrunkMaps, TrunkNetwork, build_trunk
from tavlad.clip import Features, Pooled, mirror
from tavlad.compiled import compiled, require_compiler
from tavlad.config import ModelConfig
from tavlad.draws import ClipDropout, RandomFrame
from tavlad.frame_heads import SoftAttentionLstm, mean_of_probabilities
from tavlad.frozen import FrozenTrunk, normalise, precision_of
from tavlad.temporal import change_over_time, gru_over_time, sum_over_time
from tavlad.vlad import DescriptorPca, VisualWords, Vlad

_EPS = 1e-8  # under the power, whose slope at 0 is infinite


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
        config.require_network()
        self.config = config
        self.trunk = build_trunk(config.trunk)
        size = self.trunk.feature_size
        self.attention_trunk = copy.deepcopy(self.trunk) if config.attention == "frozen-cam" else None
        self._frozen_trunk = FrozenTrunk(self.trunk)
        self._frozen_attention_trunk = FrozenTrunk(self.attention_trunk) if self.attention_trunk is not None else None
        self._compiled_late: Callable[[Tensor], TrunkMaps] | None = None
        self._compiled_head: Callable[[FrameMaps], Tensor] | None = None
        self._recompute = self._graphs = False
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
        elif config.temporal == "change":
            width = 2 * size
        self.dropout = ClipDropout(config.dropout, rows=config.dropout_place == "cluster")
        self.random_frame = RandomFrame()
        self.classifier = nn.Linear(width, num_actions)

    def initialise(self, words: VisualWords) -> None:
        """Take over the visual words: centres, assignment and PCA. Nothing to do for a model without VLAD."""
        if self.vlad is not None:
            self.vlad.initialise(words.centres_KD, self.config.alpha)
        if self.pca is not None:
            assert words.pca is not None, "the words of a model with a PCA were learned behind it"
            self.pca.mean.copy_(words.pca.mean_D)
            self.pca.components.copy_(words.pca.components_PD)

    def speed(self, *, compile: bool, cuda_graphs: bool, recompute: bool) -> None:  # noqa: A002  the setting's name
        """How to compute, not what: the settings of `training` with these names. ValueError where nothing can be
        compiled."""
        device = self.classifier.weight.device
        if compile:
            require_compiler(device)
        on_gpu = compile and device.type == "cuda"  # on a CPU the written-out gradients are quicker
        self._compiled_late = compiled(self.trunk.late, graphs=cuda_graphs) if on_gpu else None
        self._compiled_head = compiled(self.classify, graphs=cuda_graphs) if on_gpu else None
        self._recompute, self._graphs = recompute, cuda_graphs
        for frozen in (self._frozen_trunk, self._frozen_attention_trunk):
            if frozen is not None:
                frozen.compile, frozen.graphs = compile, cuda_graphs

    def train(self, mode: bool = True) -> "TaVlad":
        """Switch dropout; the trunks stay in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        if self.attention_trunk is not None:
            self.attention_trunk.eval()
        return self

    def forward(self, inputs: UInt8[Tensor, "B T 3 H W"] | Features | Pooled) -> Float[Tensor, "B A"]:
        """Logits of each action: from frames, from the features of what does not learn, or from what `pool` made of
        these."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs gave at the last step may be overwritten
        if isinstance(inputs, Pooled):
            return self._score_clips(inputs.clips_BKD)
        if isinstance(inputs, Features):
            assert self.training or not self.config.mirror_at_test, "features have no mirror image"
            if self.training and self.config.temporal == "single-frame":
                inputs = Features(self.random_frame(inputs.maps_BTDHW), None, inputs.kind)
            return self._head(self.describe(self._completed(inputs)))
        frames_BTCHW: Tensor = inputs
        if self.training and self.config.temporal == "single-frame":
            frames_BTCHW = self.random_frame(inputs)
        logits_BA = self._head(self.encode(frames_BTCHW))
        if self.config.mirror_at_test and not self.training:
            logits_BA = (logits_BA + self._head(self.encode(mirror(frames_BTCHW, self.config.modality)))) / 2
        return logits_BA

    def features(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"], *, with_activation: bool | None = None) -> Features:
        """The trunk's share of the work (steps 1, 2). The activation is left out where the model has no attention,
        unless it is asked for."""
        if with_activation is None:
            with_activation = self.config.attention != "none"
        num_frames = frames_BTCHW.shape[1]
        images = frames_BTCHW.transpose(1, 2) if self.trunk.joins_frames else frames_BTCHW.flatten(0, 1)
        maps = self._run(self.trunk, self._frozen_trunk, images, num_frames)
        activation_BTHW = None
        if with_activation and self.attention_trunk is not None:
            activation_BTHW = self._frozen_activation(frames_BTCHW)
        elif with_activation:
            activation_BTHW = _activation(maps, num_frames, self.trunk)
        return Features(self._described(maps, num_frames), activation_BTHW)

    def early_features(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Features:
        """What no stage trains of the work on frames: the map below the trunk's last block, and the activation if it
        comes from a trunk of its own."""
        early_BEHW = self._frozen_trunk.early(frames_BTCHW.flatten(0, 1), frames_BTCHW.shape[1])
        activation_BTHW = None if self.attention_trunk is None else self._frozen_activation(frames_BTCHW)
        return Features(early_BEHW.unflatten(0, frames_BTCHW.shape[:2]), activation_BTHW, "early")

    def _completed(self, features: Features) -> Features:
        """The features of the whole trunk, its last block computed where they end below it."""
        if features.kind == "last":
            return features
        num_frames = features.maps_BTDHW.shape[1]
        early_BEHW = features.maps_BTDHW.flatten(0, 1)
        if self._learns(self.trunk):
            dtype = precision_of(early_BEHW.device.type, self.classifier.weight.dtype)
            maps = self._run_late(self.trunk, early_BEHW.to(dtype, memory_format=torch.channels_last))
        else:
            maps = self._frozen_trunk.late(early_BEHW, num_frames)
        activation_BTHW = features.activation_BTHW
        if self.config.attention == "cam":
            activation_BTHW = _activation(maps, num_frames, self.trunk)
        return Features(self._described(maps, num_frames), activation_BTHW)

    def _described(self, maps: TrunkMaps, num_frames: int) -> Float[Tensor, "B T D h w"]:
        chosen = maps.pre_relu_BDHW if self.described_map == "pre_relu" else maps.post_relu_BDHW
        return chosen.transpose(1, 2) if self.trunk.joins_frames else chosen.unflatten(0, (-1, num_frames))

    def _frozen_activation(self, frames_BTCHW: Tensor) -> Float[Tensor, "B T h w"]:
        """Of the trunk that is kept for it."""
        assert self.attention_trunk is not None
        assert self._frozen_attention_trunk is not None
        num_frames = frames_BTCHW.shape[1]
        maps = self._run(self.attention_trunk, self._frozen_attention_trunk, frames_BTCHW.flatten(0, 1), num_frames)
        return _activation(maps, num_frames, self.attention_trunk)

    @property
    def descriptor_size(self) -> int:
        """D, of the descriptors as VLAD gets them: behind the PCA if there is one."""
        return self.trunk.feature_size if self.pca is None else len(self.pca.components)

    @property
    def pooled_shape(self) -> tuple[int, int]:
        """K and D of what `pool` makes of a clip."""
        return (self.config.num_clusters if self.vlad is not None else 2), self.descriptor_size

    @property
    def described_map(self) -> Literal["pre_relu", "post_relu"]:
        """Side of the last ReLU that the head reads: for models without VLAD, always the map after it."""
        return self.config.descriptor if self.config.has_vlad else "post_relu"

    def describe(self, features: Features) -> FrameMaps:
        """Descriptors and attention of every place (steps 2, 3)."""
        x_BTND = _places(features.maps_BTDHW).to(self.classifier.weight.dtype)
        if self.vlad is None:
            return FrameMaps(descriptors_BTND=x_BTND, attention_BTN=None)
        attention_BTN = None
        if self.config.attention != "none":
            assert features.activation_BTHW is not None, "a model with attention is given its activation"
            attention_BTN = self._weigh(features.activation_BTHW.flatten(2))
        return FrameMaps(descriptors_BTND=normalize(x_BTND, dim=-1, eps=1e-12), attention_BTN=attention_BTN)

    def encode(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> FrameMaps:
        """Descriptors and attention of frames."""
        return self.describe(self.features(frames_BTCHW))

    def classify(self, maps: FrameMaps) -> Float[Tensor, "B A"]:
        """Logits from the trunk's maps (steps 4-7)."""
        if self.vlad is None and self.config.temporal != "change":
            return self._score_frames(maps.descriptors_BTND)
        return self._score_clips(self._pool(maps))

    @torch.no_grad()
    def pool(self, features: Features) -> Float[Tensor, "B K D"]:
        """A clip's VLAD summed over time, or the kinds of change (`change_over_time`), each row of unit length; of a
        model whose `config.can_pool`. While the words do not learn it is the same whenever the clip is seen in the same
        view."""
        assert self.config.can_pool, "a GRU or a dropout of frames makes something else of a clip each time"
        return self._pool(self.describe(features))

    def _pool(self, maps: FrameMaps) -> Tensor:
        """One intra-normalised VLAD or state a cluster, from the trunk's maps (steps 4-6); or the kinds of change."""
        if self.vlad is None:
            change_B2D = change_over_time(maps.descriptors_BTND.mean(dim=2))
            return normalize(change_B2D, dim=-1, eps=1e-12)
        x_BTND = maps.descriptors_BTND if self.pca is None else self.pca(maps.descriptors_BTND)
        vlad_BTKD = self.vlad(x_BTND, maps.attention_BTN, self._gru_dtype())
        if self.config.dropout_place == "frame":
            vlad_BTKD = self.dropout(vlad_BTKD)
        return normalize(self._over_time(vlad_BTKD).to(x_BTND.dtype), dim=-1, eps=1e-12)

    def _score_clips(self, clip_BKU: Tensor) -> Tensor:
        """Logits from each clip's intra-normalised VLAD or states (step 7)."""
        if self.config.dropout_place == "cluster":
            clip_BKU = self.dropout(clip_BKU)
        if self.config.power != 1:
            clip_BKU = clip_BKU.sign() * (clip_BKU.abs() + _EPS).pow(self.config.power)
        video = normalize(clip_BKU.flatten(1), dim=-1, eps=1e-12)
        if self.config.dropout_place == "video":
            video = self.dropout(video)
        with torch.autocast(video.device.type, enabled=False):
            return self.classifier(video)

    def _head(self, maps: FrameMaps) -> Tensor:
        return (self._compiled_head or self.classify)(maps)

    def _over_time(self, vlad_BTKD: Tensor) -> Tensor:
        """(B, T, K, D) → (B, K, U), or (B, K, D) without a GRU."""
        if self.gru is None:
            return sum_over_time(vlad_BTKD)
        return gru_over_time(vlad_BTKD, self.gru, self.config.temporal_readout, self._gru_dtype())

    def _gru_dtype(self) -> torch.dtype | None:
        """What the GRU's products are computed in, None for the weights' own.

        Lower in training alone: in bf16 a state depends on how many clips are computed at once; scores must not.
        """
        device = self.classifier.weight.device.type
        is_mixed = self.gru is not None and self.training and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_mixed else None

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
        activation_BTHW = self.features(frames_BTCHW, with_activation=True).activation_BTHW
        assert activation_BTHW is not None
        return self._weigh(activation_BTHW.flatten(2)).unflatten(2, tuple(activation_BTHW.shape[2:]))

    def _weigh(self, activation_BTN: Tensor) -> Tensor:
        with torch.autocast(activation_BTN.device.type, enabled=False):
            return attention_weights(activation_BTN, self.config.attention_scale, self.config.attention_temperature)

    def _run(self, trunk: TrunkNetwork, frozen: FrozenTrunk, images_BCHW: Tensor, num_frames: int) -> TrunkMaps:
        """The trunk's maps of 0-255 images (or clips); without gradients below the first part that learns."""
        if torch.compiler.is_compiling():  # an exported graph is the plain one
            return trunk.maps(normalise(trunk, images_BCHW, self.classifier.weight.dtype))
        if not self._learns(trunk):
            return frozen.maps(images_BCHW, num_frames)
        return self._run_late(trunk, frozen.early(images_BCHW, num_frames))

    def _learns(self, trunk: TrunkNetwork) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trunk.parameters())

    def _run_late(self, trunk: TrunkNetwork, early_BEHW: Tensor) -> TrunkMaps:
        """The last block as it learns."""
        late = self._compiled_late if self._compiled_late is not None and trunk is self.trunk else trunk.late
        if self._recompute:
            return checkpoint(late, early_BEHW, use_reentrant=False)
        return late(early_BEHW)


def _activation(maps: TrunkMaps, num_frames: int, trunk: TrunkNetwork) -> Float[Tensor, "B T h w"]:
    classifier = trunk.classifier  # a ValueError where there are no such maps
    post_relu_BTDHW = maps.post_relu_BDHW.unflatten(0, (-1, num_frames))
    activation_BTN = class_activation(_places(post_relu_BTDHW), classifier)
    return activation_BTN.unflatten(2, tuple(post_relu_BTDHW.shape[3:]))


def _places(map_BTDHW: Float[Tensor, "B T D h w"]) -> Float[Tensor, "B T N D"]:
    return map_BTDHW.flatten(3).transpose(2, 3)
