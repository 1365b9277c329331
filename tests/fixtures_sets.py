"""Videos whose frames can be told from their pixels, and a small packed set of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shards.datasets import VideoSet, scan
from shards.index import Index
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, PackPlan, plan_packing
from shards.store import Store, open_store

ACTIONS = ("clap", "jump", "wave")


def draw_number(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame (H, W, 3) that shows `number` in binary as eight vertical bars, which survive any codec."""
    bits_8 = [(number >> bit) & 1 for bit in range(8)]
    return np.repeat(np.repeat(np.repeat(bits_8, width // 8)[None, :, None], height, 0), 3, 2).astype(np.uint8) * 255


def read_number(frame_HWC: np.ndarray) -> int:
    """The number that `draw_number` drew, from a frame of any size."""
    width = frame_HWC.shape[1]
    row = frame_HWC.astype(float).mean(axis=(0, 2))
    bars = [row[int((bit + 0.25) * width / 8) : int((bit + 0.75) * width / 8)].mean() for bit in range(8)]
    return sum((bar > 127) << bit for bit, bar in enumerate(bars))


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
) -> Path:
    """Encodes RGB frames (H, W, 3), 25 a second or at `times` in 1/100 s; the suffix chooses the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.thread_count = 1
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index if times is None else times[index]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_numbered_video(path: Path, num_frames: int, first: int = 0, **how: object) -> Path:
    """A video whose frame i shows the number first + i."""
    return write_video(path, [draw_number(first + index) for index in range(num_frames)], **how)


def make_folders(root: Path, videos_per_action: int = 6) -> Path:
    """A folder per action; video v of action a shows the numbers from 80 a + 13 v on, so every frame is its own."""
    for label, action in enumerate(ACTIONS):
        for video in range(videos_per_action):
            path = root / action / f"clip {video}.avi"
            write_numbered_video(path, 9 + video, first=80 * label + 13 * video)
    return root


def pack(plan: PackPlan, store: Store) -> Index:
    """All of packing, in one process."""
    return finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)


@dataclass(frozen=True, kw_only=True)
class PackedSet:
    """A finished set and what it was made from."""

    videos: VideoSet
    plan: PackPlan
    store: Store
    index: Index


PACK_OPTIONS = PackOptions(num_frames=4, short_side=32)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoSet:
    """18 videos of 3 actions, in 3 splits of 12 train and 6 test."""
    return scan("numbers", make_folders(tmp_path_factory.mktemp("videos")), "folders")


@pytest.fixture(scope="session")
def packed(videos: VideoSet, tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    """The videos in 3 shards, 4 frames of 42x32 a clip. Not to be written to: see `copy_of_packed`."""
    store = open_store(str(tmp_path_factory.mktemp("set")))
    plan = plan_packing(videos, PACK_OPTIONS)
    return PackedSet(videos=videos, plan=plan, store=store, index=pack(plan, store))
