"""Trajectory-pooled descriptors (TDD, Wang et al. 2015): a normalised map of the trunk, summed along trajectories.

What differs from the source: the spatial network alone, one map (the trunk's last) at one scale, and the trunk as
ImageNet left it, where TDD's learned on the actions first.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

_EPS = 1e-6


def normalised_maps(maps_TDHW: Float[Tensor, "T D h w"]) -> list[Float[Tensor, "T D h w"]]:
    """The map after its last ReLU, over each channel's highest value in the clip, and over each place's highest
    channel (TDD, section 3.3)."""
    over_clip = maps_TDHW / maps_TDHW.amax(dim=(0, 2, 3), keepdim=True).clamp_min(_EPS)
    over_channels = maps_TDHW / maps_TDHW.amax(dim=1, keepdim=True).clamp_min(_EPS)
    return [over_clip, over_channels]


def pool_along(
    maps_TDHW: Float[Tensor, "T D h w"], tracks_PL3: Float32[np.ndarray, "P L 3"]
) -> Float32[np.ndarray, "P D"]:
    """The map summed over each trajectory's points, each at the nearest place (TDD, Eq. 4).

    A point is its frame's number, its row and its column in parts of the frame.
    """
    height, width = maps_TDHW.shape[2:]
    tracks = torch.from_numpy(tracks_PL3)
    frame_PL = tracks[..., 0].long()
    row_PL = (tracks[..., 1] * height).long().clamp(0, height - 1)
    column_PL = (tracks[..., 2] * width).long().clamp(0, width - 1)
    places_XD = maps_TDHW.float().permute(0, 2, 3, 1).flatten(0, 2)
    place_PL = (frame_PL * height + row_PL) * width + column_PL
    return torch.nn.functional.embedding_bag(place_PL, places_XD, mode="sum").numpy()
