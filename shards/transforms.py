"""The forty views of a clip: corner cropping, scale jittering and flipping, the same for all its frames."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
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


def crop_clip(frames_TCHW: UInt8[Tensor, "T C H W"], view: View | None, size: int) -> UInt8[Tensor, "T C size size"]:
    """The view's square of every frame as `size` x `size` pixels; no view means `CENTRE_VIEW`.

    Bilinear, with antialiasing where it shrinks, as PIL resizes for TSN and ActionVLAD. Channels that come last in
    memory still do, which is much the faster.
    """
    view = CENTRE_VIEW if view is None else view
    top, left, side = square_of(view, *frames_TCHW.shape[-2:])
    square_TCSS = frames_TCHW[..., top : top + side, left : left + side]
    if side != size:
        square_TCSS = F.interpolate(square_TCSS, size=(size, size), mode="bilinear", antialias=True)
    return square_TCSS.flip(-1) if view.flip else square_TCSS
