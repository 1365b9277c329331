"""Motion as pictures: how a video changes after each of its chosen frames, in the three channels of an image.

They are packed, cropped, read and learned from like frames. Scales are fixed, so that pictures can be compared:

flow         channel 0 to the right, 1 down, 2 the length, of dense optical flow (DIS, Kroeger et al. 2016) to the frame
             `FLOW_STEP` later; rest is 128, 128, 0, and `FLOW_RANGE` of the frame's short side is 127 more or less in
             channels 0 and 1, 255 in channel 2. What moves faster is at the end of the scale.
difference   how much brighter a pixel is one, two and three frames later, in this order; 128 is "as bright", and a
             sixty-third of the range of grey is 2 more or less.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Num, UInt8

from shards.flow import dense_flow, opencv
from shards.video import DecodedClip, decode_clip, decode_frames_at, never

Motion = Literal["flow", "difference"]

FLOW_STEP = 1
FLOW_RANGE = 1 / 32
_STEPS: Mapping[Motion, tuple[int, ...]] = {"flow": (0, FLOW_STEP), "difference": (0, 1, 2, 3)}
_REST, _ENDS = 128, 127  # so that a mirrored flow is exactly representable: 1 to 255


def decode_motion(
    source: str | Path | bytes,
    num_frames: int,
    short_side: int | None,
    kind: Motion,
    suffix: str = "",
    given_up: Callable[[], bool] = never,
) -> DecodedClip:
    """Like `decode_clip`, with the motion that begins at each chosen frame in its place.

    Where a video ends too early for it, motion begins as late as it can. Raises `VideoError` like `decode_clip`.
    """
    clip = decode_clip(source, num_frames, short_side, suffix, given_up)
    numbers_TS = frames_needed(clip.frame_indices, clip.num_source_frames, kind)
    numbers = sorted({number for numbers_S in numbers_TS for number in numbers_S})
    frames = dict(zip(numbers, decode_frames_at(source, numbers, short_side, suffix, given_up), strict=True))
    pictures = [motion_picture([frames[number] for number in numbers_S], kind) for numbers_S in numbers_TS]
    return DecodedClip(
        frames_THWC=np.stack(pictures),
        frame_indices=clip.frame_indices,
        num_source_frames=clip.num_source_frames,
        source_fps=clip.source_fps,
        width=clip.width,
        height=clip.height,
    )


def motion_of_frames(
    frames_NCHW: UInt8[np.ndarray, "N 3 H W"], chosen: Sequence[int], kind: Motion
) -> UInt8[np.ndarray, "T 3 H W"]:
    """The motion that begins at each chosen frame of a video whose RGB frames are all at hand."""
    frames_NHWC = np.ascontiguousarray(frames_NCHW.transpose(0, 2, 3, 1))
    numbers_TS = frames_needed(chosen, len(frames_NHWC), kind)
    pictures = [motion_picture([frames_NHWC[number] for number in numbers_S], kind) for numbers_S in numbers_TS]
    return np.stack(pictures).transpose(0, 3, 1, 2)


def frames_needed(chosen: Sequence[int], num_source_frames: int, kind: Motion) -> list[list[int]]:
    """For each chosen frame the numbers of the frames that its motion is made of.

    >>> frames_needed([0, 5, 9], 10, "difference")
    [[0, 1, 2, 3], [5, 6, 7, 8], [6, 7, 8, 9]]
    >>> frames_needed([0, 1], 2, "difference")
    [[0, 1, 1, 1], [0, 1, 1, 1]]
    """
    steps, last = _STEPS[kind], num_source_frames - 1
    firsts = [min(number, max(0, last - steps[-1])) for number in chosen]
    return [[min(first + step, last) for step in steps] for first in firsts]


def motion_picture(frames_SHWC: Sequence[UInt8[np.ndarray, "H W 3"]], kind: Motion) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of the motion over these RGB frames, one for each step of `kind`."""
    cv2 = opencv()
    grey_SHW = [cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY) for frame_HWC in frames_SHWC]
    if kind == "difference":
        first, *later = (grey_HW.astype(np.int16) for grey_HW in grey_SHW)
        return _around_rest(np.stack([2 * (grey_HW - first) for grey_HW in later], axis=-1))
    height, width = grey_SHW[0].shape
    part_HW2 = dense_flow(*grey_SHW) / (FLOW_RANGE * min(height, width))  # of the range
    length_HW1 = np.rint(255 * np.linalg.norm(part_HW2, axis=-1, keepdims=True)).clip(0, 255).astype(np.uint8)
    return np.concatenate([_around_rest(np.rint(_ENDS * part_HW2)), length_HW1], axis=-1)


def _around_rest(values_HWC: Num[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    return (_REST + values_HWC.clip(-_ENDS, _ENDS)).astype(np.uint8)
