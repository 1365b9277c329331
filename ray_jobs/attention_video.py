"""A small video of where a model looks: its frames, and beside them the same under the attention."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.render import encode_video
from tavlad.errors import UserError
from tavlad.predict import Prediction

_FRAMES_PER_SECOND = 5
_SHARE_OF_COLOUR = 0.55
_SIDE = 224
"""Pixels of a picture, at least."""


def write_attention_video(
    path: Path, frames_TCHW: Tensor, attention_Thw: NDArray[np.float32], prediction: Prediction
) -> None:
    """An MP4 file, five frames a second, of the T frames and of them under their maps (viridis, from 0 to 1).

    ValueError if `path` does not end in .mp4.
    """
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path} is no .mp4 file: name one for the attention of {prediction.video}")
    height, width = frames_TCHW.shape[2:]
    scale = max(1, -(-_SIDE // min(height, width)))
    size = [2 * (scale * side // 2) for side in (height, width)]  # H.264 takes even sizes
    frames = torch.nn.functional.interpolate(frames_TCHW.float(), size=size, mode="bilinear")
    maps = torch.nn.functional.interpolate(torch.from_numpy(attention_Thw)[:, None], size=size, mode="bilinear")
    colours_THWC = matplotlib.colormaps["viridis"](maps[:, 0].numpy())[..., :3] * 255
    plain_THWC = frames.permute(0, 2, 3, 1).numpy()
    mixed_THWC = (1 - _SHARE_OF_COLOUR) * plain_THWC + _SHARE_OF_COLOUR * colours_THWC
    beside_THWC = np.concatenate([plain_THWC, mixed_THWC], axis=2).round().clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_video(beside_THWC, _FRAMES_PER_SECOND))
