"""HMDB51 and UCF101 as they are published: from their archives to a folder per action, counted."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.archives import archives_in, unpack
from shards.split_files import read_hmdb51, read_ucf101
from tavlad.errors import UserError

PublishedName = Literal["hmdb51", "ucf101"]
Advance = Callable[[int, str], None]
"""Told how many actions are in place, and the newest one's name."""

_UNPACKING = ".unpacking"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSet:
    """What the archives of a data set hold."""

    name: PublishedName
    num_actions: int
    num_listed: int
    """Videos that the split files name."""
    num_videos: int
    """Videos at least in the archive; HMDB51's has a few that no split file names."""
    parts: tuple[tuple[int, int], ...]
    """Training and test videos of splits 1, 2 and 3."""
    video_archive: str
    splits_archive: str


PUBLISHED = {
    "hmdb51": PublishedSet(
        name="hmdb51",
        num_actions=51,
        num_listed=6766,
        num_videos=6766,
        parts=((3570, 1530),) * 3,
        video_archive="hmdb51_org.rar",
        splits_archive="test_train_splits.rar",
    ),
    "ucf101": PublishedSet(
        name="ucf101",
        num_actions=101,
        num_listed=13320,
        num_videos=13320,
        parts=((9537, 3783), (9586, 3734), (9624, 3696)),
        video_archive="UCF101.rar",
        splits_archive="UCF101TrainTestSplits-RecognitionTask.zip",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A data set on disk, ready to be packed."""

    videos: Path
    """A folder per action."""
    splits: Path | None
    """The folder of its split files, if their archive was given."""
    num_actions: int
    num_videos: int


def prepare_videos(published: PublishedSet, archive: Path, folder: Path, advance: Advance) -> tuple[Path, int]:
    """Unpack the archive of the videos into `folder`/videos/ACTION/NAME.avi; returns that folder and its video count.

    Actions are put in place whole; started again after an interruption, those that are there are kept. Raises
    ValueError for a wrong archive, naming what is missing.
    """
    videos = folder / "videos"
    if _num_actions(videos) != published.num_actions:
        temporary = folder / _UNPACKING
        _remove(temporary)
        try:
            unpack(archive, temporary / "outer")
            _place_actions(temporary, videos, published.num_actions, advance)
        finally:
            _remove(temporary)
    advance(_num_actions(videos), "")
    counts = Counter(path.parent.name for path in videos.glob("*/*.avi"))
    if len(counts) != published.num_actions or sum(counts.values()) < published.num_videos:
        raise UserError(
            f"{videos} holds {sum(counts.values())} videos of {len(counts)} actions, and {published.name} has "
            f"{published.num_videos} of {published.num_actions}: {archive} is cut off or not "
            f"{published.video_archive}; fetch it again, remove {videos}, and repeat"
        )
    return videos, sum(counts.values())


def prepare_splits(published: PublishedSet, archive: Path, folder: Path, videos: Path) -> Path:
    """Unpack the split files into `folder`/splits and count them against the published numbers and the videos."""
    splits, temporary = folder / "splits", folder / f"{_UNPACKING}-splits"
    _remove(temporary)
    try:
        unpack(archive, temporary)
        texts = [path for path in temporary.rglob("*.txt") if not path.name.startswith(".")]
        if not texts:
            raise UserError(f"{archive} holds no split files: give {published.splits_archive}")
        _remove(splits)
        splits.mkdir(parents=True)
        for path in texts:
            path.replace(splits / path.name)
    finally:
        _remove(temporary)
    listing = (read_hmdb51 if published.name == "hmdb51" else read_ucf101)(splits)
    for split, expected in enumerate(published.parts, start=1):
        parts = Counter(video.splits[split - 1] for video in listing.videos)
        if (parts["train"], parts["test"]) != expected:
            raise UserError(
                f"split {split} of {archive} has {parts['train']} training and {parts['test']} test videos, and "
                f"{published.name}'s has {expected[0]} and {expected[1]}: give {published.splits_archive} as published"
            )
    missing = [video.name for video in listing.videos if not (videos / video.name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(listing.videos)} videos that the split files name are not in {videos} "
            f"(first: {missing[0]}): fetch {published.video_archive} again"
        )
    return splits


def _place_actions(temporary: Path, videos: Path, num_actions: int, advance: Advance) -> None:
    """Moves every folder of videos below `temporary` to `videos`/ACTION, unpacking archives inside archives first."""
    inner = archives_in(temporary / "outer")
    for number, nested in enumerate([None, *inner]):
        source = temporary / "outer"
        if nested is not None:
            if (videos / nested.stem).is_dir():
                continue
            source = temporary / "inner"
            unpack(nested, source)
            nested.unlink()
        for action in sorted({path.parent for path in source.rglob("*.avi")}):
            target = videos / action.name
            if not target.exists():
                videos.mkdir(parents=True, exist_ok=True)
                action.replace(target)
            advance(min(_num_actions(videos), num_actions - 1), action.name)
        if number:
            _remove(source)


def _num_actions(videos: Path) -> int:
    return sum(path.is_dir() for path in videos.iterdir()) if videos.is_dir() else 0


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
