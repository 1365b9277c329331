"""Motion as pictures: what they show, at which moments, and that they are packed and mirrored as motion."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.datasets import VideoSet
from shards.motion import FLOW_RANGE, decode_motion, frames_needed, motion_of_frames, motion_picture
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader, LoaderOptions
from shards.store import open_store
from shards.transforms import VIEWS
from shards.video import decode_clip
from tavlad.clip import mirror


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of 4 pixels in random grey, (H, W, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4)), dtype=np.uint8)
    grey_HW = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    return np.repeat(grey_HW[..., None], 3, axis=2)


@pytest.mark.parametrize(("across", "down"), [(2, 0), (-1, 0), (0, 3), (-2, -1)])
def test_flow_is_pixels_to_the_right_and_down_at_the_stated_scale(across: int, down: int) -> None:
    frame = texture(120, 160)
    moved = np.roll(frame, (down, across), (0, 1))
    seen = np.median(motion_picture([frame, moved], "flow")[20:100, 20:140].reshape(-1, 3), axis=0)
    scale = FLOW_RANGE * 120
    expected = [128 + 127 * across / scale, 128 + 127 * down / scale, 255 * np.hypot(across, down) / scale]
    assert seen == pytest.approx(expected, abs=4)


def test_flow_beyond_the_scale_is_at_its_end() -> None:
    frame = texture(64, 200)
    seen = np.median(motion_picture([frame, np.roll(frame, 6, 1)], "flow")[:, 20:180].reshape(-1, 3), axis=0)
    assert seen.tolist() == [255, pytest.approx(128, abs=4), 255]


def test_what_stands_still_is_at_rest() -> None:
    frame = texture(48, 64)
    assert np.unique(motion_picture([frame] * 2, "flow").reshape(-1, 3), axis=0).tolist() == [[128, 128, 0]]
    assert np.unique(motion_picture([frame] * 4, "difference")).tolist() == [128]


def test_differences_are_twice_the_change_of_grey_after_one_two_and_three_frames() -> None:
    frames = [np.full((8, 9, 3), grey, np.uint8) for grey in (100, 110, 90, 255)]
    assert np.unique(motion_picture(frames, "difference").reshape(-1, 3), axis=0).tolist() == [[148, 108, 255]]


def test_motion_of_the_mirrored_video_is_the_mirrored_motion() -> None:
    frame = texture(96, 128)
    frames = [frame, np.roll(frame, (1, 2), (0, 1))]
    seen = torch.from_numpy(motion_picture(frames, "flow")).permute(2, 0, 1)
    of_mirrored = motion_picture([np.ascontiguousarray(each[:, ::-1]) for each in frames], "flow")
    inner = (slice(None), slice(16, 80), slice(16, 112))
    difference = mirror(seen, "flow").int() - torch.from_numpy(of_mirrored).permute(2, 0, 1).int()
    assert difference[inner].abs().float().mean() < 1
    assert torch.equal(mirror(mirror(seen, "flow"), "flow"), seen)
    assert torch.equal(mirror(seen, "difference"), seen.flip(-1))


@pytest.mark.parametrize("kind", ["flow", "difference"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 30])
def test_motion_is_that_of_the_frames_that_packing_chooses(kind, num_frames: int, tmp_path: Path, numbered) -> None:
    path = numbered.write(tmp_path / "v.mp4", num_frames, codec="h264")
    motion, clip = decode_motion(path, 5, 32, kind), decode_clip(path, 5, 32)
    assert (motion.frame_indices, motion.num_source_frames) == (clip.frame_indices, num_frames)
    assert motion.frames_THWC.shape == clip.frames_THWC.shape
    every = decode_clip(path, num_frames, 32).frames_THWC
    steps = {"flow": 1, "difference": 3}[kind]
    for picture, first in zip(motion.frames_THWC, clip.frame_indices, strict=True):
        first = min(first, max(0, num_frames - 1 - steps))
        frames = [every[min(first + step, num_frames - 1)] for step in range(steps + 1)]
        assert np.array_equal(picture, motion_picture(frames, kind))
    at_hand = motion_of_frames(every.transpose(0, 3, 1, 2), clip.frame_indices, kind)
    assert np.array_equal(at_hand.transpose(0, 2, 3, 1), motion.frames_THWC)
    assert len(np.unique(motion.frames_THWC)) > 1 or num_frames == 1


def test_motion_near_the_end_begins_earlier() -> None:
    assert frames_needed([0, 8, 9], 10, "flow") == [[0, 1], [8, 9], [8, 9]]
    assert frames_needed([0, 6, 7], 8, "difference") == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]


def test_frames_of_any_size_have_a_flow() -> None:
    """In a process of its own: DIS reads beyond narrow frames, and its process ends by a signal."""
    program = """
import numpy as np
from shards.motion import motion_picture
for height, width in [(1, 1), (8, 8), (12, 40), (16, 200), (30, 400), (31, 3000), (32, 3000), (300, 20)]:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert motion_picture([frame, np.roll(frame, 1, 1)], "flow").shape == (height, width, 3)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_set_of_flow_is_packed_the_same_twice_and_says_what_it_is(
    videos: VideoSet, packed, tmp_path: Path, numbered
) -> None:
    options = PackOptions(modality="flow", num_frames=4, short_side=32)
    stores = [open_store(str(tmp_path / name)) for name in "ab"]
    one, other = (numbered.pack(plan_packing(videos, options), store) for store in stores)
    assert one.modality == "flow"
    assert one.fingerprint == other.fingerprint != packed.index.fingerprint
    for path in stores[0].list():
        assert stores[0].read(path) == stores[1].read(path)
    same = ("key", "split1", "split2", "split3", "group", "label")
    tables = [index.clips_table.table.select(same) for index in (one, packed.index)]
    assert tables[0].equals(tables[1]), "the same keys, splits and order as the set of the videos themselves"


def test_mirrored_views_of_a_set_of_flow_exchange_right_and_left(videos: VideoSet, tmp_path: Path, numbered) -> None:
    store = open_store(str(tmp_path))
    options = PackOptions(modality="flow", num_frames=4, short_side=32)
    index = numbered.pack(plan_packing(videos, options), store)
    reading = LoaderOptions(batch_size=4, seed=0, crop=24, augment=True, shuffle=False, num_threads=0)
    loader = ClipLoader(index, store, 1, "train", reading)
    straight, flipped = VIEWS[0], VIEWS[1]
    assert (straight.scale, straight.place) == (flipped.scale, flipped.place)
    assert flipped.flip
    seen, mirrored = (loader.read_view(0, view) for view in (straight, flipped))
    assert torch.equal(mirrored, mirror(seen, "flow"))
    assert not torch.equal(mirrored, seen.flip(-1)), "something moves"


def test_rgb_sets_are_named_as_before_and_motion_needs_frames() -> None:
    assert "modality" not in PackOptions().facts()
    assert PackOptions(modality="flow").facts()["modality"] == "flow"
    with pytest.raises(ValueError, match="modality flow is computed when packing: choose the format frames"):
        PackOptions(modality="flow", format="video")
