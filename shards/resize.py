"""PyTorch's bilinear resize of uint8 pictures on a CPU, by the same integers on any device.

PyTorch has no such kernel for a GPU, where a resize in float32 rounds some pixels otherwise. Which device makes a view
must not change what a model learns from.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor


class _Taps(NamedTuple):
    """Which input pixels each output pixel is made of, and their weights in units of 2**-bits."""

    places_KN: Int64[Tensor, "K N"]
    weights_KN: Int32[Tensor, "K N"]
    bits: int


def resize(frames_TCHW: UInt8[Tensor, "T C H W"], height: int, width: int) -> UInt8[Tensor, "T C height width"]:
    """What `F.interpolate(..., mode="bilinear", antialias=True)` makes of uint8 frames on a CPU, pixel by pixel."""
    return _resize_along(-2, _resize_along(-1, frames_TCHW, width), height)


def _resize_along(dim: int, frames_TCHW: Tensor, size: int) -> Tensor:
    if frames_TCHW.shape[dim] == size:
        return frames_TCHW
    places_KN, weights_KN, bits = _taps(frames_TCHW.shape[dim], size, frames_TCHW.device)
    total = torch.full((), 1 << (bits - 1), dtype=torch.int32, device=frames_TCHW.device)  # rounds to the nearest
    for places_N, weights_N in zip(places_KN, weights_KN, strict=True):
        pixels = frames_TCHW.index_select(dim, places_N).int()
        total = total + pixels * (weights_N[:, None] if dim == -2 else weights_N)
    return (total >> bits).clamp_(0, 255).byte()


@lru_cache(maxsize=256)
def _taps(num_in: int, num_out: int, device: torch.device) -> _Taps:
    """A triangle around each output pixel's centre, as wide as the picture shrinks, in 16-bit weights."""
    scale = num_in / num_out
    reach = max(1.0, scale)
    firsts: list[int] = []
    weights: list[list[float]] = []
    for number in range(num_out):
        centre = scale * (number + 0.5)
        first = max(int(centre - reach + 0.5), 0)
        end = min(int(centre + reach + 0.5), num_in)
        triangle = [max(0.0, 1 - abs((place - centre + 0.5) / reach)) for place in range(first, end)]
        firsts.append(first)
        weights.append([each / sum(triangle) for each in triangle])
    bits, largest = 0, max(map(max, weights))
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:  # the most that 16 bits hold
        bits += 1
    num_taps = max(map(len, weights))
    whole = [[int(0.5 + each * (1 << bits)) for each in row] + [0] * (num_taps - len(row)) for row in weights]
    places = [[min(first + tap, num_in - 1) for tap in range(num_taps)] for first in firsts]
    return _Taps(
        places_KN=torch.tensor(places, device=device).T.contiguous(),
        weights_KN=torch.tensor(whole, dtype=torch.int32, device=device).T.contiguous(),
        bits=bits,
    )
