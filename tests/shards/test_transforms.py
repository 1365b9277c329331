"""The forty views: all occur, none else, and each is what a slow formula makes of it."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.transforms import (
    CENTRE_VIEW,
    TSN_VIEWS,
    VIEWS,
    View,
    crop_clip,
    draw_tsn_view,
    draw_view,
    window_of,
)


def slow_resize(image_HW: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with antialiasing: a triangle as wide as one output pixel where it shrinks, float64, by loops."""
    source = image_HW.shape[0]
    scale = source / size
    width = max(scale, 1.0)
    weights_OI = np.zeros((size, source))
    for out in range(size):
        centre = (out + 0.5) * scale
        for place in range(source):
            weights_OI[out, place] = max(0.0, 1 - abs(place + 0.5 - centre) / width)
        weights_OI[out] /= weights_OI[out].sum()
    return weights_OI @ image_HW.astype(np.float64) @ weights_OI.T


def slow_crop(frame_CHW: np.ndarray, view: View, size: int) -> np.ndarray:
    height, width = frame_CHW.shape[1:]
    side = int(min(height, width) * view.scale)
    rows = {"top": 0, "bottom": height - side, "centre": (height - side) // 2}
    columns = {"left": 0, "right": width - side, "centre": (width - side) // 2}
    words = view.place.split()
    top, left = rows[words[0]], columns[words[-1]]
    channels = [slow_resize(channel[top : top + side, left : left + side], size) for channel in frame_CHW]
    cropped = np.stack(channels)
    return cropped[:, :, ::-1] if view.flip else cropped


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_views_are_four_scales_five_places_and_flips() -> None:
    assert len(set(VIEWS)) == 40
    assert {view.scale for view in VIEWS} == {1, 0.875, 0.75, 0.65625}
    assert CENTRE_VIEW in VIEWS


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [28, 40])
def test_every_view_is_what_the_slow_formula_gives(size: int, channels_last: bool) -> None:
    frames_TCHW = noise(2, 3, 32, 45)
    if channels_last:
        frames_TCHW = frames_TCHW.contiguous(memory_format=torch.channels_last)
    for view in VIEWS:
        expected = np.stack([slow_crop(frame_CHW.numpy(), view, size) for frame_CHW in frames_TCHW])
        difference = np.abs(crop_clip(frames_TCHW, view, size).numpy() - expected)
        assert difference.max() < 1.05, view  # half a level for each of two roundings, and the weights' own


def test_views_differ_but_for_the_corners_that_the_whole_short_side_reaches() -> None:
    frames_TCHW = noise(1, 3, 32, 45)
    seen = [crop_clip(frames_TCHW, view, 24).numpy().tobytes() for view in VIEWS]
    assert len(set(seen[10:])) == 30
    assert len(set(seen)) == 36  # at scale 1, top and bottom are one: left, centre and right remain


def test_tall_frames_are_cropped_along_their_height() -> None:
    frames_TCHW = noise(1, 3, 45, 32)
    bottom = crop_clip(frames_TCHW, View(scale=1.0, place="bottom left", flip=False), 32)
    assert torch.equal(bottom, frames_TCHW[:, :, 13:])


def test_evaluation_sees_the_centre_224_of_256_pixels_untouched() -> None:
    frames_TCHW = noise(1, 3, 256, 340)
    assert torch.equal(crop_clip(frames_TCHW, None, 224), frames_TCHW[:, :, 16:240, 58:282])


def test_evaluation_has_the_same_field_of_view_at_any_size() -> None:
    frames_TCHW = noise(1, 3, 128, 170)
    assert torch.equal(crop_clip(frames_TCHW, None, 112), frames_TCHW[:, :, 8:120, 29:141])


@settings(max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), index=st.integers(0, 39), size=st.integers(1, 40))
def test_any_frame_size_can_be_viewed(height: int, width: int, index: int, size: int) -> None:
    cropped = crop_clip(noise(2, 3, height, width), VIEWS[index], size)
    assert cropped.shape == (2, 3, size, size)
    assert cropped.dtype == torch.uint8


def test_one_draw_a_clip_depends_on_seed_epoch_and_key_alone() -> None:
    assert [VIEWS.index(draw_view(5, epoch, "wave%2Fa%2Eavi")) for epoch in range(6)] == [34, 20, 39, 31, 31, 10]


def test_views_are_drawn_evenly() -> None:
    drawn = Counter(draw_view(0, epoch, f"clip{clip}") for epoch in range(20) for clip in range(400))
    assert len(drawn) == 40
    chi_squared = sum((count - 200) ** 2 / 200 for count in drawn.values())
    assert chi_squared < 80  # 39 degrees of freedom: above 80 once in 10,000


def test_draws_of_epochs_and_of_clips_are_independent() -> None:
    pairs = Counter((draw_view(0, 0, f"{clip}").flip, draw_view(0, 1, f"{clip}").flip) for clip in range(2000))
    assert all(400 < count < 600 for count in pairs.values())
    assert len(pairs) == 4


def tsn_rectangles(height: int, width: int, size: int) -> set[tuple[int, int, int, int]]:
    """Top, left, height, width of every crop that TSN draws from, step by step as its authors describe it."""
    short = min(height, width)
    sides = [size if abs(int(short * scale) - size) < 3 else int(short * scale) for scale in (1, 0.875, 0.75, 0.66)]
    found: set[tuple[int, int, int, int]] = set()
    for i, tall in enumerate(sides):
        for j, wide in enumerate(sides):
            if abs(i - j) > 1:
                continue
            right, down = (width - wide) // 4, (height - tall) // 4
            corners = {(0, 0), (4 * right, 0), (0, 4 * down), (4 * right, 4 * down), (2 * right, 2 * down)}
            edges = {(0, 2 * down), (4 * right, 2 * down), (2 * right, 4 * down), (2 * right, 0)}
            quarters = {(a * right, b * down) for a in (1, 3) for b in (1, 3)}
            found |= {(top, left, tall, wide) for left, top in corners | edges | quarters}
    return found


@pytest.mark.parametrize(("height", "width", "size"), [(256, 340, 224), (240, 320, 224), (340, 256, 112), (48, 64, 32)])
def test_tsn_draws_from_its_thirteen_places_and_ten_shapes(height: int, width: int, size: int) -> None:
    assert len(set(TSN_VIEWS)) == 13 * 10 * 2
    windows = [window_of(view, height, width, size) for view in TSN_VIEWS]
    assert {window[:4] for window in windows} == tsn_rectangles(height, width, size)
    assert sum(window.flip for window in windows) == 130


@given(height=st.integers(1, 400), width=st.integers(1, 400), size=st.integers(1, 300), index=st.integers(0, 259))
def test_tsn_rectangle_lies_inside_any_frame(height: int, width: int, size: int, index: int) -> None:
    top, left, tall, wide, _ = window_of(TSN_VIEWS[index], height, width, size)
    assert 0 <= top < top + tall <= height
    assert 0 <= left < left + wide <= width


def test_tsn_view_is_stretched_to_a_square_as_the_slow_formula_says() -> None:
    columns_HW = torch.arange(0, 200, 4).repeat(40, 1).to(torch.uint8)  # 40 x 50, brighter to the right
    view = next(
        view for view in TSN_VIEWS if (view.height, view.width, view.place, view.flip) == (1, 0.875, (0, 4), True)
    )
    top, left, tall, wide, _ = window_of(view, 40, 50, 20)
    assert (top, left, tall, wide) == (0, 12, 40, 35)
    cropped = crop_clip(columns_HW.expand(2, 3, 40, 50), view, 20)
    assert cropped.shape == (2, 3, 20, 20)
    centres = (np.arange(20) + 0.5) * 35 / 20 - 0.5 + left
    inner = slice(2, -2)  # at the edges the triangle of the filter is cut off
    assert np.abs(cropped[0, 0, 7].numpy()[::-1][inner] - 4 * centres[inner]).max() < 1.05


def test_tsn_draw_is_pinned_and_uniform() -> None:
    assert [TSN_VIEWS.index(draw_tsn_view(5, epoch, "wave%2Fa%2Eavi")) for epoch in range(4)] == [118, 68, 117, 211]
    counts = Counter(TSN_VIEWS.index(draw_tsn_view(0, epoch, str(clip))) for epoch in range(20) for clip in range(1300))
    assert len(counts) == 260
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 370  # 259 degrees of freedom: once in 100,000
