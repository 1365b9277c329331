"""Views of a clip: which rectangle of its frames is seen, and whether mirrored; the same for all its frames.

The forty of METHOD (corner cropping, scale jittering, flipping), and TSN's finer 13 places x 10 shapes x flip.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

Place = Literal["centre", "top left", "top right", "bottom left", "bottom right"]

SCALES = (1.0, 0.875, 0.75, 0.65625)
PLACES: tuple[Place, ...] = ("centre", "top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A square of the frame, and whether it is mirrored."""

    scale: float
    """Side of the square over the frame's short side."""
    place: Place
    flip: bool
    """Left and right exchanged."""


VIEWS = tuple(
    View(scale=scale, place=place, flip=flip) for scale in SCALES for place in PLACES for flip in (False, True)
)
"""4 scales x 5 places x flip (METHOD, "augmentation")."""

CENTRE_VIEW = View(scale=0.875, place="centre", flip=False)
"""What a model is tested on: the centre 224 of 256 pixels, and the same field of view at any other size."""


TSN_SCALES = (1.0, 0.875, 0.75, 0.66)
TSN_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)
"""Quarters of the room above and to the left of the rectangle."""
_SNAP = 3  # pixels: a side this near to the size given out is made that size, so that nothing is resized


@dataclass(frozen=True, kw_only=True, slots=True)
class TsnView:
    """A rectangle of the frame, at most one scale step away from a square, and whether it is mirrored.

    Source: GroupMultiScaleCrop of TSN (Wang et al. 2016) with `more_fix_crop` and `max_distort` 1, and its flip.
    """

    height: float
    """Over the frame's short side."""
    width: float
    """Over the frame's short side."""
    place: tuple[int, int]
    """One of `TSN_PLACES`."""
    flip: bool


TSN_VIEWS = tuple(
    TsnView(height=TSN_SCALES[h], width=TSN_SCALES[w], place=place, flip=flip)
    for h, w in itertools.product(range(len(TSN_SCALES)), repeat=2)
    if abs(h - w) <= 1
    for place in TSN_PLACES
    for flip in (False, True)
)
"""10 shapes x 13 places x flip."""

ViewPolicy = Literal["corner-scale", "tsn"]


class Window(NamedTuple):
    """A view in the pixels of one size of frame."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def views_of(key: str) -> tuple[View, ...]:
    """The forty views in an order of the clip's own. A training on `v` views of a clip has the first v, so what is
    computed for fewer views serves more."""
    return tuple(VIEWS[view] for view in _order_of(key))


def draw_slot(seed: int, epoch: int, key: str, num_views: int = len(VIEWS)) -> int:
    """Which of a clip's first `num_views` views an epoch shows, uniform: a function of its arguments, of no generator's
    state."""
    assert 1 <= num_views <= len(VIEWS), num_views
    return _draw(f"{seed} {epoch} {key}") % num_views


def draw_view(seed: int, epoch: int, key: str, num_views: int = len(VIEWS)) -> View:
    """The view of a clip in an epoch."""
    return views_of(key)[draw_slot(seed, epoch, key, num_views)]


@functools.lru_cache(maxsize=100_000)
def _order_of(key: str) -> bytes:
    draws = np.random.Philox(key=_draw(key)).random_raw(len(VIEWS))
    return bytes(np.argsort(draws, kind="stable").astype(np.uint8))


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draw_tsn_view(seed: int, epoch: int, key: str) -> TsnView:
    """Like `draw_view`, uniform over TSN's 260."""
    return TSN_VIEWS[_draw(f"{seed} {epoch} {key}") % len(TSN_VIEWS)]


def window_of(view: View | TsnView | None, height: int, width: int, size: int) -> Window:
    """The view's rectangle in a frame of this size, to be made `size` x `size`; no view means `CENTRE_VIEW`.

    The frame must not be smaller than a pixel; TSN's rectangles snap to `size` as they do in TSN.
    """
    if not isinstance(view, TsnView):
        view = CENTRE_VIEW if view is None else view
        top, left, side = square_of(view, height, width)
        return Window(top, left, side, side, view.flip)
    short = min(height, width)
    tall, wide = (max(1, int(short * scale)) for scale in (view.height, view.width))
    tall, wide = (size if abs(side - size) < _SNAP and size <= short else side for side in (tall, wide))
    down, right = (height - tall) // 4, (width - wide) // 4
    return Window(view.place[0] * down, view.place[1] * right, tall, wide, view.flip)


def square_of(view: View, height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side in pixels of the view's square in a frame of this size."""
    side = max(1, int(view.scale * min(height, width)))
    down, right = height - side, width - side
    top, left = {
        "centre": (down // 2, right // 2),
        "top left": (0, 0),
        "top right": (0, right),
        "bottom left": (down, 0),
        "bottom right": (down, right),
    }[view.place]
    return top, left, side


def crop_clip(
    frames_TCHW: UInt8[Tensor, "T C H W"], view: View | TsnView | None, size: int
) -> UInt8[Tensor, "T C size size"]:
    """The view of every frame as `size` x `size` pixels; no view means `CENTRE_VIEW`.

    Bilinear, with antialiasing where it shrinks, as PIL resizes for TSN and ActionVLAD. Channels that come last in
    memory still do, which is much the faster.
    """
    num_frames, channels, height, width = frames_TCHW.shape
    is_last = frames_TCHW.movedim(-3, -1).is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    shape = (num_frames, channels, size, size)
    out = torch.empty(shape, dtype=torch.uint8, device=frames_TCHW.device, memory_format=layout)
    top, left, tall, wide, flip = window_of(view, height, width, size)
    resize_into(frames_TCHW[..., top : top + tall, left : left + wide], flip, out)
    return out


def resize_into(frames_TCHW: UInt8[Tensor, "T C H W"], flip: bool, out_TCSS: UInt8[Tensor, "T C S S"]) -> None:
    """Writes every frame, resized as `crop_clip` does it, and mirrored if it is to be flipped."""
    size = out_TCSS.shape[-1]
    if frames_TCHW.shape[-2:] == (size, size):
        out_TCSS.copy_(frames_TCHW.flip(-1) if flip else frames_TCHW)
    elif flip:
        out_TCSS.copy_(F.interpolate(frames_TCHW, size=(size, size), mode="bilinear", antialias=True).flip(-1))
    else:  # what F.interpolate calls, with a place for the result: a twentieth of reading a clip
        torch.ops.aten._upsample_bilinear2d_aa.out(frames_TCHW, (size, size), False, None, None, out=out_TCSS)
