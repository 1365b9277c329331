"""What crosses the border between the data and the model: a clip's frame choice and a batch of clips."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tavlad.errors import UserError

Modality = Literal["rgb", "flow", "difference"]
"""What a clip's frames show: the video, or its motion as pictures (shards/motion.py)."""


class BadClip(UserError):
    """A clip that cannot be used; the text names it, the reason and the remedy."""


def uniform_frame_indices(num_frames: int, num_samples: int) -> list[int]:
    """The frames of a clip, uniform over time: floor(linspace(0, num_frames, num_samples, endpoint=False)).

    Indices are 0-based and ascending; a video shorter than `num_samples` gives some frames more than once.
    Source: METHOD, "frames"; section 3.1 of the paper (25 frames, uniformly sampled across time).

    >>> uniform_frame_indices(10, 4)
    [0, 2, 5, 7]
    >>> uniform_frame_indices(2, 4)
    [0, 0, 1, 1]
    """
    if num_frames < 1 or num_samples < 1:
        raise ValueError(f"cannot choose {num_samples} frames from {num_frames}: both must be at least 1")
    # Integer arithmetic: floating-point linspace can fall just below a whole number.
    return [sample * num_frames // num_samples for sample in range(num_samples)]


def mirror(frames_TCHW: UInt8[Tensor, "*T 3 H W"], modality: Modality) -> UInt8[Tensor, "*T 3 H W"]:
    """Left and right exchanged, as a new tensor; in pictures of flow what moved to the right then moves to the left."""
    mirrored = frames_TCHW.flip(-1)
    if modality == "flow":
        reverse_flow(mirrored)
    return mirrored


def reverse_flow(frames_TCHW: UInt8[Tensor, "*T 3 H W"]) -> None:
    """Exchange right and left in the first channel of pictures of flow, in place; 128 is rest."""
    across_THW = frames_TCHW[..., 0, :, :]
    across_THW.copy_((256 - across_THW.to(torch.int16)).clamp_(max=255))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """One rank's share of a global batch. It may hold no clip, when the last batch is shorter than the world."""

    frames_BTCHW: UInt8[Tensor, "B T 3 H W"]
    """RGB frames, or pictures of their motion, 0-255."""
    labels_B: Int64[Tensor, " B"]
    """Index of each clip's action in the set's label order."""
    keys: tuple[str, ...]
    """Key of each clip in the shard set."""
    num_clips_in_global_batch: int
    """Clips over all ranks: what the loss of this step is averaged over."""

    def __post_init__(self) -> None:
        _check_batch(len(self.frames_BTCHW), self.labels_B, self.keys, self.num_clips_in_global_batch)

    def inputs(self, device: torch.device) -> Tensor:
        """What the model is called with: the frames, or one blank clip where there is none (ranks meet in the
        gradient exchange, so each must compute something)."""
        frames_BTCHW = self.frames_BTCHW if self.keys else _blank(self.frames_BTCHW)
        return frames_BTCHW.to(device)

    def to(self, device: torch.device) -> "ClipBatch":
        """The same on a device; from page-locked memory without waiting for the copy."""
        frames_BTCHW, labels_B = (each.to(device, non_blocking=True) for each in (self.frames_BTCHW, self.labels_B))
        return replace(self, frames_BTCHW=frames_BTCHW, labels_B=labels_B)

    def part(self, start: int, stop: int) -> "ClipBatch":
        """Some of its clips, which may be none."""
        return ClipBatch(
            frames_BTCHW=self.frames_BTCHW[start:stop],
            labels_B=self.labels_B[start:stop],
            keys=self.keys[start:stop],
            num_clips_in_global_batch=self.num_clips_in_global_batch,
        )


FeatureKind = Literal["last", "early"]
"""Of the whole trunk, for a stage in which all of it is frozen; or of what lies below its last block, for one that
trains that block."""


class Features(NamedTuple):
    """What the frozen part of a trunk makes of a batch of clips: all that the rest of the model needs of them."""

    maps_BTDHW: Float[Tensor, "B T D h w"]
    """The last feature map, on the side of its last non-linearity that the model's descriptors come from; of kind
    "early" the map below the last block."""
    activation_BTHW: Float[Tensor, "B T h' w'"] | None
    """The winning ImageNet class's activation at the last map's places, before the sigmoid that makes it attention (Eq.
    4); None for a model without attention, and where the trunk that makes it still learns."""
    kind: FeatureKind = "last"

    def to(self, device: torch.device) -> "Features":
        """The same on a device; from page-locked memory without waiting for the copy."""
        activation = None if self.activation_BTHW is None else self.activation_BTHW.to(device, non_blocking=True)
        return Features(self.maps_BTDHW.to(device, non_blocking=True), activation, self.kind)


class Pooled(NamedTuple):
    """What a head whose words do not learn makes of a batch of clips before its dropout and classifier."""

    clips_BKD: Float[Tensor, "B K D"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureBatch:
    """A `ClipBatch` whose frames have been through the frozen part of the trunk."""

    features: Features
    labels_B: Int64[Tensor, " B"]
    keys: tuple[str, ...]
    num_clips_in_global_batch: int

    def __post_init__(self) -> None:
        _check_batch(len(self.features.maps_BTDHW), self.labels_B, self.keys, self.num_clips_in_global_batch)

    def inputs(self, device: torch.device) -> Features:
        """What the model is called with: the features, or those of one blank clip where there is none."""
        maps, activation, kind = self.features
        if not self.keys:
            maps, activation = _blank(maps), None if activation is None else _blank(activation)
        return Features(maps, activation, kind).to(device)

    def to(self, device: torch.device) -> "FeatureBatch":
        """The same on a device; from page-locked memory without waiting for the copy."""
        return replace(self, features=self.features.to(device), labels_B=self.labels_B.to(device, non_blocking=True))

    def part(self, start: int, stop: int) -> "FeatureBatch":
        """Some of its clips, which may be none."""
        maps, activation, kind = self.features
        return FeatureBatch(
            features=Features(maps[start:stop], None if activation is None else activation[start:stop], kind),
            labels_B=self.labels_B[start:stop],
            keys=self.keys[start:stop],
            num_clips_in_global_batch=self.num_clips_in_global_batch,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledBatch:
    """A `ClipBatch` whose frames have been through all of a model that a stage does not train: trunk, VLAD, sum."""

    pooled_BKD: Float[Tensor, "B K D"]
    """What `TaVlad.pool` makes of the clips."""
    labels_B: Int64[Tensor, " B"]
    keys: tuple[str, ...]
    num_clips_in_global_batch: int

    def __post_init__(self) -> None:
        _check_batch(len(self.pooled_BKD), self.labels_B, self.keys, self.num_clips_in_global_batch)

    def inputs(self, device: torch.device) -> Pooled:
        """What the model is called with: the clips, or a blank one where there is none."""
        return Pooled((self.pooled_BKD if self.keys else _blank(self.pooled_BKD)).to(device))

    def to(self, device: torch.device) -> "PooledBatch":
        """The same on a device; from page-locked memory without waiting for the copy."""
        pooled_BKD, labels_B = (each.to(device, non_blocking=True) for each in (self.pooled_BKD, self.labels_B))
        return replace(self, pooled_BKD=pooled_BKD, labels_B=labels_B)

    def part(self, start: int, stop: int) -> "PooledBatch":
        """Some of its clips, which may be none."""
        return PooledBatch(
            pooled_BKD=self.pooled_BKD[start:stop],
            labels_B=self.labels_B[start:stop],
            keys=self.keys[start:stop],
            num_clips_in_global_batch=self.num_clips_in_global_batch,
        )


Batch = ClipBatch | FeatureBatch | PooledBatch


def _blank(values: Tensor) -> Tensor:
    return values.new_zeros(1, *values.shape[1:])


def _check_batch(num_clips: int, labels_B: Tensor, keys: tuple[str, ...], num_clips_in_global_batch: int) -> None:
    assert num_clips == len(labels_B) == len(keys), "one label and one key a clip"
    assert 1 <= num_clips_in_global_batch >= num_clips, "a rank's clips are part of the global batch"
