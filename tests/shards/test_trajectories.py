"""Trajectories of pictures whose motion is known."""

import cv2
import numpy as np
import pytest

from shards.trajectories import LENGTH, trajectories

SIDE, STEP = 128, 2


def _textured(height: int, width: int, seed: int = 0) -> "np.ndarray":
    """A picture with something to follow everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 3)


def _moving(num_frames: int, still: bool = False) -> "np.ndarray":
    """A texture that moves `STEP` pixels to the left each frame."""
    wide = _textured(SIDE, SIDE + STEP * num_frames)
    return np.stack([wide[:, (0 if still else STEP * t) :][:, :SIDE] for t in range(num_frames)])


def test_points_follow_what_moves() -> None:
    tracks_PL3 = trajectories(_moving(25))
    assert tracks_PL3.shape[1:] == (LENGTH, 3)
    assert set(tracks_PL3[:, 0, 0]) == {0, 5, 10}
    np.testing.assert_array_equal(np.diff(tracks_PL3[..., 0], axis=1), 1)
    steps_PS2 = np.diff(tracks_PL3[..., 1:], axis=1) * SIDE
    assert np.median(steps_PS2[..., 1]) == pytest.approx(-STEP, abs=0.1)
    assert np.median(steps_PS2[..., 0]) == pytest.approx(0, abs=0.1)
    assert (tracks_PL3[..., 1:] >= 0).all()
    assert (tracks_PL3[..., 1:] < 1).all()


def test_only_what_moves_is_followed() -> None:
    frames = _moving(16)
    frames[:, :, SIDE // 2 :] = _moving(16, still=True)[:, :, SIDE // 2 :]
    columns = trajectories(frames)[:, 0, 2]
    assert len(columns) > 50
    assert (columns < 0.55).all(), "but for points beside the border, which the flow smooths over"


def test_still_clip_and_short_clip_have_trajectories_too() -> None:
    still = trajectories(_moving(20, still=True))
    assert len(still) > 100
    assert np.abs(np.diff(still[..., 1:], axis=1)).max() < 0.01
    assert trajectories(_moving(4)).shape[1] == 4
    assert trajectories(np.zeros((3, 64, 64, 3), dtype=np.uint8)).shape[1] == 3
