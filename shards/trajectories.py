"""Dense trajectories: points of a grid, followed through a clip's frames by dense optical flow (Wang et al. 2011).

As there: median-filtered flow, no points where a frame is smooth, and none that stand still or jump. Unlike there the
frames are a clip's T, uniform over its video, points begin in every fifth of them, and the camera's motion stays in.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

LENGTH = 15
"""Frames of a trajectory; fewer in clips that have fewer."""
_EVERY = 5  # frames between two beginnings
_GRID = 28  # points in a row, and rows
_FLAT = 0.001  # of the frame's highest eigenvalue: below, there is nothing to follow
_STILL, _JUMP = 0.004, 0.7  # spread in parts of the frame's side; one step in parts of the whole way
_FAR = 0.05  # of the frame's side: below, no step is a jump
_MEDIAN = 5  # pixels


def trajectories(frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "P L 3"]:
    """P trajectories through L frames: frame number, row and column of each point, the latter in parts of the frame,
    0 to 1.

    Where nothing moves all points of the grid are kept, standing still: every clip has trajectories.
    """
    cv2 = _opencv()
    grey_THW = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames_THWC]
    flows = [_flow(cv2, before, after) for before, after in itertools.pairwise(grey_THW)]
    length = min(LENGTH, len(grey_THW))
    size = np.array(grey_THW[0].shape, dtype=np.float32)
    found: list[Float32[np.ndarray, "P L 3"]] = []
    for first in range(0, len(grey_THW) - length + 1, _EVERY):
        points_P2 = _grid(cv2, grey_THW[first])
        tracks = [points_P2]
        for flow_HW2 in flows[first : first + length - 1]:
            row_P, column_P = np.rint(tracks[-1]).astype(int).clip(0, size.astype(int) - 1).T
            tracks.append(tracks[-1] + flow_HW2[row_P, column_P, ::-1])
        tracks_PL2 = np.stack(tracks, axis=1) / size
        number_PL1 = np.broadcast_to(np.arange(first, first + length)[:, None], (*tracks_PL2.shape[:2], 1))
        found.append(np.concatenate([number_PL1, tracks_PL2], axis=2, dtype=np.float32))
    every_PL3 = np.concatenate(found)
    kept_P = _is_followed(every_PL3[..., 1:])
    return every_PL3[kept_P] if kept_P.any() else every_PL3


def _is_followed(tracks_PL2: Float32[np.ndarray, "P L 2"]) -> Any:
    """Which tracks stay in the frame, move, and do not jump."""
    stays_P = ((tracks_PL2 >= 0) & (tracks_PL2 < 1)).all(axis=(1, 2))
    moves_P = tracks_PL2.std(axis=1).max(axis=1) > _STILL
    steps_PS = np.linalg.norm(np.diff(tracks_PL2, axis=1), axis=2)
    furthest_P = steps_PS.max(axis=1, initial=0)
    jumps_P = (furthest_P > _FAR) & (furthest_P > _JUMP * steps_PS.sum(axis=1))
    return stays_P & moves_P & ~jumps_P


def _grid(cv2: Any, grey_HW: UInt8[np.ndarray, "H W"]) -> Float32[np.ndarray, "P 2"]:
    """Points of the grid at which there is something to follow (rows, columns in pixels); all of a blank frame's."""
    axes = [(np.arange(_GRID) + 0.5) * side / _GRID for side in grey_HW.shape]
    points_P2 = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
    corner_HW = cv2.cornerMinEigenVal(grey_HW, 3)
    corner_P = corner_HW[tuple(points_P2.astype(int).T)]
    kept_P = corner_P > _FLAT * corner_HW.max()
    return points_P2[kept_P] if kept_P.any() else points_P2


def _flow(cv2: Any, before_HW: UInt8[np.ndarray, "H W"], after_HW: UInt8[np.ndarray, "H W"]) -> Any:
    """Pixels to the right and down that each pixel moves, (H, W, 2)."""
    flow_HW2 = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(before_HW, after_HW, None)
    return np.stack([cv2.medianBlur(np.ascontiguousarray(flow_HW2[..., axis]), _MEDIAN) for axis in (0, 1)], axis=-1)


def _opencv() -> Any:
    """OpenCV, on one thread: DIS shares a frame out by threads, and their number would change the flow."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
