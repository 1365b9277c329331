"""What goes into a shard set and into which shard, decided before anything is packed, and the name that follows."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.clip_bytes import key_of
from shards.datasets import Video, VideoSet
from shards.index import FORMAT
from tavlad.clip import Modality
from tavlad.errors import UserError

_BYTES_PER_PIXEL = 0.3  # of a JPEG of quality 90, measured on real clips: 0.19 to 0.31
_MEGABYTE = 1_000_000
_PARALLEL_SHARDS = 8  # small sets are dealt to as many, so that they too are packed in parallel
_DIGEST_THREADS = 16  # more than cores: a file may come from far


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """How videos are packed. Every field is part of the set's fingerprint."""

    format: Literal["frames", "video"] = "frames"
    """JPEGs of the chosen frames, or the video files themselves, decoded when they are read."""
    modality: Modality = "rgb"
    """What the frames show: the video; its optical flow; or differences of its frames (shards/motion.py)."""
    num_frames: int = 25
    """Frames per clip, T, uniform over the video."""
    short_side: int = 256
    """Pixels of the frames' short side; shorter videos keep theirs."""
    jpeg_quality: int = 90
    """1 to 100; of no effect on format video."""
    shard_megabytes: float = 64.0
    """Size aimed at, by estimate: see `plan_packing`."""
    seed: int = 0
    """Of the random order in which clips are dealt to shards."""

    def __post_init__(self) -> None:
        if self.format not in ("frames", "video"):
            raise UserError(f"format is {self.format!r}: choose frames or video")
        if self.format == "video" and self.modality != "rgb":
            raise UserError(f"modality {self.modality} is computed when packing: choose the format frames")
        for field, low, high in (("num_frames", 1, 10_000), ("short_side", 16, 4096), ("jpeg_quality", 1, 100)):
            if not low <= getattr(self, field) <= high:
                raise UserError(f"{field} is {getattr(self, field)}: choose {low} to {high}")
        if not self.shard_megabytes > 0:  # which no NaN is
            raise UserError(f"shard_megabytes is {self.shard_megabytes}: choose a size above 0, such as 64")

    def facts(self) -> dict[str, object]:
        """What a set's index says of them; "rgb" goes without saying, as before there was anything else."""
        facts = dataclasses.asdict(self)
        if self.modality == "rgb":
            del facts["modality"]
        return facts


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """One video as the plan knows it."""

    key: str
    video: Video
    label: int
    num_bytes: int
    digest: str
    """SHA-256 of the video file; empty if it cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """What goes into which shard; `fingerprint` names all of it."""

    name: str
    actions: tuple[str, ...]
    options: PackOptions
    shards: tuple[tuple[PlannedClip, ...], ...]
    fingerprint: str

    @property
    def num_clips(self) -> int:
        """Videos in all shards."""
        return sum(map(len, self.shards))

    def only(self, number: int) -> "PackPlan":
        """The plan without the clips of the other shards: all that packing one shard needs, and small to send."""
        mine = self.shards[number]
        return dataclasses.replace(self, shards=(*(() for _ in self.shards[:number]), mine))


def plan_packing(
    video_set: VideoSet, options: PackOptions, advance: Callable[[int], object] = lambda num_read: None
) -> PackPlan:
    """Deals the videos to shards. Reads every file once, for its digest, and decodes nothing.

    The number of shards follows from the files' sizes for format video, and for frames from an estimate that needs no
    video: a frame of short side S is taken as 4:3, so S·S·4/3 pixels at 0.3 bytes. Videos are dealt in an order given
    by a digest of (seed, key), shard by shard. `advance` is told how many files have been read.
    """
    labels = {action: label for label, action in enumerate(video_set.actions)}
    clips: list[PlannedClip] = []
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        found = pool.map(size_and_digest, [video.path for video in video_set.videos])
        for video, (num_bytes, digest) in zip(video_set.videos, found, strict=True):
            label = labels[video.action]
            clips.append(
                PlannedClip(key=key_of(video.name), video=video, label=label, num_bytes=num_bytes, digest=digest)
            )
            advance(len(clips))
    dealt = sorted(clips, key=lambda clip: (_digest([options.seed, clip.key]), clip.key))
    bounds = _bounds(clips, options)
    described = [
        [clip.key, clip.label, clip.video.splits, clip.video.group, clip.num_bytes, clip.digest] for clip in dealt
    ]
    return PackPlan(
        name=video_set.name,
        actions=video_set.actions,
        options=options,
        shards=tuple(tuple(dealt[start:end]) for start, end in itertools.pairwise(bounds)),
        fingerprint=_digest([FORMAT, video_set.name, video_set.actions, options.facts(), len(bounds) - 1, described]),
    )


def size_and_digest(path: Path) -> tuple[int, str]:
    """Bytes in a file and their SHA-256; (0, "") for one that cannot be read: packing will tell why."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return 0, ""


def _bounds(clips: list[PlannedClip], options: PackOptions) -> list[int]:
    """Where each shard begins among the dealt clips, and where the last one ends."""
    if options.format == "video":
        num_bytes = sum(clip.num_bytes for clip in clips)
    else:
        num_bytes = len(clips) * options.num_frames * options.short_side**2 * 4 / 3 * _BYTES_PER_PIXEL
    num_shards = math.ceil(num_bytes / (options.shard_megabytes * _MEGABYTE))
    num_shards = max(num_shards, min(_PARALLEL_SHARDS, math.ceil(len(clips) / _PARALLEL_SHARDS)))
    num_shards = min(num_shards, len(clips))
    return [len(clips) * number // num_shards for number in range(num_shards + 1)]


def _digest(described: object) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
