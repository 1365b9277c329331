"""Small pictures drawn with numpy alone: shapes given by their signed distance, painted with soft edges.

A picture is a float32 array (H, W, 3) of RGB values 0..255, changed in place.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Picture: TypeAlias = NDArray[np.float32]
Colour: TypeAlias = tuple[float, float, float]
Shape: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
"""Signed distance to a shape of radius about 1 at points (u, v): negative inside, never inside beyond radius 1.25."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Where a shape stands: centre and radius in pixels, turn in radians."""

    x: float
    y: float
    radius: float
    angle: float = 0.0


def paint(picture_HWC: Picture, shape: Shape, pose: Pose, colour: Colour, opacity: float = 1.0) -> None:
    """Paint one shape over the picture; parts outside the picture are cut off."""
    height, width = picture_HWC.shape[:2]
    reach = 1.25 * pose.radius + 1
    left, right = _span(pose.x - reach, pose.x + reach, width)
    top, bottom = _span(pose.y - reach, pose.y + reach, height)
    if left >= right or top >= bottom or opacity <= 0:
        return
    dx_W = (np.arange(left, right, dtype=np.float32) - np.float32(pose.x))[None, :] / np.float32(pose.radius)
    dy_H = (np.arange(top, bottom, dtype=np.float32) - np.float32(pose.y))[:, None] / np.float32(pose.radius)
    cos, sin = np.float32(math.cos(pose.angle)), np.float32(math.sin(pose.angle))
    u_HW = np.asarray(dx_W * cos + dy_H * sin, np.float32)
    v_HW = np.asarray(dy_H * cos - dx_W * sin, np.float32)
    distance_HW = shape(u_HW, v_HW) * np.float32(pose.radius)
    cover_HW1 = (np.clip(0.5 - distance_HW, 0, 1) * np.float32(opacity))[..., None]
    box_HWC = picture_HWC[top:bottom, left:right]
    box_HWC += cover_HW1 * (np.asarray(colour, np.float32) - box_HWC)


def _span(start: float, end: float, size: int) -> tuple[int, int]:
    return max(0, math.floor(start)), min(size, math.ceil(end) + 1)


def disc(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """A filled circle."""
    return np.hypot(u, v) - np.float32(1)


def ring(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """An outlined circle."""
    return np.abs(np.hypot(u, v) - np.float32(0.78)) - np.float32(0.22)


def square(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """A filled square."""
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.85)


def triangle(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """A filled triangle that points up (to negative v)."""
    return np.maximum(v - np.float32(0.6), np.abs(u) * np.float32(0.866) - v * np.float32(0.5) - np.float32(0.6))


def cross(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two crossed bars."""
    long, wide = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(long - np.float32(1.05), wide - np.float32(0.24))


def star(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """A star with five points, the first one up."""
    fifth = np.float32(2 * math.pi / 5)
    turn = np.abs(np.mod(np.arctan2(u, -v) + fifth / 2, fifth) - fifth / 2)
    radius = np.hypot(u, v)
    # Between a point at radius 1.1 and the next dent at radius 0.48 the edge is a straight line; this is its distance.
    dent = 0.48 * math.cos(math.pi / 5), 0.48 * math.sin(math.pi / 5)
    edge = dent[0] - 1.1, dent[1]
    length = math.hypot(*edge)
    along, aside = radius * np.cos(turn), radius * np.sin(turn)
    return ((along - np.float32(1.1)) * np.float32(edge[1]) - aside * np.float32(edge[0])) / np.float32(length)


def bar(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """A thin line."""
    return np.maximum(np.abs(u) - np.float32(1.2), np.abs(v) - np.float32(0.05))


def wedge(half_angle: float) -> Shape:
    """The part of a disc within `half_angle` radians (at most pi/2) of the direction +u: an open mouth."""
    cos, sin = np.float32(math.cos(half_angle)), np.float32(math.sin(half_angle))

    def distance(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.maximum(disc(u, v), np.abs(v) * cos - u * sin)

    return distance


def disc_without_wedge(half_angle: float) -> Shape:
    """A disc with that mouth cut out."""
    cos, sin = np.float32(math.cos(half_angle)), np.float32(math.sin(half_angle))

    def distance(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.maximum(disc(u, v), u * sin - np.abs(v) * cos)

    return distance


def texture(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A cloudy picture of one muted hue: noise at four scales, in light and a little in colour."""
    base_C = rng.uniform(70, 150) + rng.uniform(-25, 25, 3)
    picture_HWC = np.broadcast_to(base_C, (height, width, 3)).astype(np.float32)
    for cells, strength in ((2, 22), (5, 18), (12, 14), (30, 9)):
        grid = rng.standard_normal((cells + 1, cells * width // height + 1, 4)).astype(np.float32)
        cloud_HW4 = _stretch(_stretch(grid, height).swapaxes(0, 1), width).swapaxes(0, 1)
        picture_HWC += np.float32(strength) * (cloud_HW4[..., :1] + np.float32(0.3) * cloud_HW4[..., 1:])
    return picture_HWC


def _stretch(grid: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The grid with its first axis interpolated linearly to `size` places."""
    # Not a matrix product: its rounding depends on the number of threads, and a seed must give the same bytes.
    place = np.linspace(0, len(grid) - 1, size)
    left = np.minimum(place.astype(int), len(grid) - 2)
    share = (place - left).astype(np.float32).reshape(-1, *(1,) * (grid.ndim - 1))
    return np.asarray(grid[left] + share * (grid[left + 1] - grid[left]), np.float32)


def vivid_colour(rng: np.random.Generator, hue: float | None = None) -> Colour:
    """A saturated, bright colour; hue 0..1 around the colour circle, drawn when None."""
    position = 6 * (rng.uniform() if hue is None else hue % 1)
    saturation, value = rng.uniform(0.75, 1), rng.uniform(215, 250)
    red, green, blue = (
        value * (1 - saturation * max(0.0, min(1.0, min(k, 4 - k))))
        for k in ((position + 5) % 6, (position + 3) % 6, (position + 1) % 6)
    )
    return red, green, blue


def muted_colour(rng: np.random.Generator) -> Colour:
    """A greyish colour, light or dark."""
    grey = rng.uniform(40, 190)
    red, green, blue = grey + rng.uniform(-30, 30, 3)
    return float(red), float(green), float(blue)
