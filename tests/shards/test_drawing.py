"""Shapes cover what their definitions say, and nothing outside the box that is painted."""

import math

import numpy as np
import pytest

from shards import drawing
from shards.drawing import Pose, Shape

WHITE = (255.0, 255.0, 255.0)


def cover(shape: Shape, pose: Pose, size: int = 101) -> float:
    """Painted area in pixels."""
    picture = np.zeros((size, size, 3), np.float32)
    drawing.paint(picture, shape, pose, WHITE)
    return float(picture[..., 0].sum() / 255)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        (drawing.disc, math.pi),
        (drawing.ring, math.pi * (1 - 0.56**2)),
        (drawing.square, 1.7**2),
        (drawing.cross, 2 * 2.1 * 0.48 - 0.48**2),
        (drawing.star, 5 * 1.1 * 0.48 * math.sin(math.pi / 5)),
        (drawing.bar, 2.4 * 0.1),
        (drawing.wedge(0.7), 0.7),
        (drawing.disc_without_wedge(0.7), math.pi - 0.7),
    ],
)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_painted_area_is_the_shape_s_area(shape: Shape, area: float, angle: float) -> None:
    pose = Pose(x=50.0, y=50.0, radius=30.0, angle=angle)
    assert cover(shape, pose) == pytest.approx(area * 30**2, rel=0.015)


def test_triangle_has_three_equal_sides() -> None:
    # Height 0.6 / 0.5 above the centre and 0.6 below, as in an equilateral triangle with an inner radius of 0.6.
    assert cover(drawing.triangle, Pose(x=50.0, y=50.0, radius=30.0)) == pytest.approx(
        3 * math.sqrt(3) * 18**2, rel=0.015
    )


@pytest.mark.parametrize(
    "shape", [drawing.disc, drawing.ring, drawing.square, drawing.triangle, drawing.cross, drawing.star, drawing.bar]
)
def test_shape_stays_within_the_box_that_is_painted(shape: Shape) -> None:
    angles = np.linspace(0, 2 * math.pi, 720, dtype=np.float32)
    u, v = np.float32(1.25) * np.cos(angles), np.float32(1.25) * np.sin(angles)
    assert (shape(u, v) > 0).all()


def test_shape_beyond_the_edge_is_cut_off() -> None:
    inside = cover(drawing.disc, Pose(x=50.0, y=50.0, radius=20.0))
    assert cover(drawing.disc, Pose(x=0.0, y=50.0, radius=20.0)) == pytest.approx(inside / 2, rel=0.05)
    assert cover(drawing.disc, Pose(x=-40.0, y=50.0, radius=20.0)) == 0


def test_half_opaque_paint_mixes_with_what_is_below() -> None:
    picture = np.full((21, 21, 3), 100, np.float32)
    drawing.paint(picture, drawing.disc, Pose(x=10.0, y=10.0, radius=5.0), (200.0, 0.0, 100.0), 0.5)
    assert picture[10, 10].tolist() == [150, 50, 100]


def test_texture_is_the_same_for_a_seed_and_differs_between_seeds() -> None:
    first, again, other = (drawing.texture(np.random.default_rng(seed), 36, 48) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
