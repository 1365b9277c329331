"""Which videos a data set has, with their actions, splits and groups: what packing starts from."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from shards.index import NUM_SPLITS, Part, Splits
from shards.split_files import ListedVideo, Listing, read_hmdb51, read_table_of_videos, read_ucf101
from tavlad.errors import UserError

Layout = Literal["hmdb51", "ucf101", "folders", "table"]

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()  # noqa: SIM905
)
_READERS = {"hmdb51": read_hmdb51, "ucf101": read_ucf101, "table": read_table_of_videos}
_TEST_FRACTION = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video file and what is said of it."""

    path: Path
    name: str
    """Path below the videos folder, with `/`."""
    action: str
    splits: Splits
    """Its part in splits 1, 2 and 3."""
    group: str
    """Clips of one group come from one recording."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSet:
    """A data set before packing."""

    name: str
    actions: tuple[str, ...]
    """In label order."""
    videos: tuple[Video, ...]
    """Sorted by name."""
    num_unlisted: int
    """Video files in the folder that no split file names; they are left out (HMDB51 has 83)."""


def scan(name: str, videos: Path, layout: Layout, splits: Path | None = None, seed: int = 0) -> VideoSet:
    """The videos below the folder `videos`, and the splits that `splits` gives them.

    hmdb51, ucf101: `ACTION/NAME.avi`; `splits` is the folder of the published split files.
    folders: a folder per action; no `splits`: `seed` makes three 70/30 ones, each action by itself.
    table: `splits` is a CSV or Parquet file, see `read_table_of_videos`.
    Raises ValueError for a split file that names an absent video, an unknown action or a video twice, and for a split
    with an action that has no training video.
    """
    videos = videos.absolute()  # workers run in folders of their own
    if not videos.is_dir():
        raise UserError(f"{videos} is no folder: give the folder that holds the videos")
    present = _video_files(videos)
    if layout == "folders":
        if splits is not None:
            raise UserError(
                f"a folder per action has no split files, so {splits} cannot be used; choose the layout table"
            )
        listing = split_folders(videos, present, seed)
    else:
        if splits is None:
            raise UserError(f"the layout {layout} needs its split files: say where they are")
        listing = _READERS[layout](splits)
    listed = {video.name for video in listing.videos}
    _check(listing, videos, present, layout)
    return VideoSet(
        name=name,
        actions=listing.actions,
        videos=tuple(
            Video(
                path=videos / video.name, name=video.name, action=video.action, splits=video.splits, group=video.group
            )
            for video in listing.videos
        ),
        num_unlisted=sum(file not in listed for file in present),
    )


def split_folders(videos: Path, files: Sequence[str], seed: int) -> Listing:
    """Three splits of `ACTION/...` files: 70 % of each action train, 30 % test, by an order drawn from (seed, name).

    The three test parts do not overlap while an action has four or more videos. An action's only video is for training.
    """
    actions = sorted(entry.name for entry in videos.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    listed: list[ListedVideo] = []
    for action in actions:
        names = [name for name in files if name.partition("/")[0] == action]
        if not names:
            raise UserError(f"the folder {videos / action} holds no video; put some in it, or remove it")
        names.sort(key=lambda name: hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest())
        num_test = max(1, round(_TEST_FRACTION * len(names))) if len(names) > 1 else 0
        for place, name in enumerate(names):
            parts = ["test" if (place - k * num_test) % len(names) < num_test else "train" for k in range(NUM_SPLITS)]
            splits = cast(Splits, tuple(parts))
            group = str(PurePosixPath(name).with_suffix(""))
            listed.append(ListedVideo(name=name, action=action, splits=splits, group=group, where=str(videos)))
    if not listed:
        raise UserError(f"{videos} holds no folder with videos: make one folder per action")
    return Listing(actions=tuple(actions), videos=tuple(sorted(listed, key=lambda video: video.name)))


def _video_files(videos: Path) -> list[str]:
    """Names of all video files below the folder, sorted; hidden files and folders do not count."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(videos, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        found += [path.relative_to(videos).as_posix() for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    return sorted(found)


def _check(listing: Listing, videos: Path, present: Sequence[str], layout: Layout) -> None:
    on_disk = set(present)
    for video in listing.videos:
        # A table may name files of any suffix.
        if video.name not in on_disk and not (videos / video.name).is_file():
            raise UserError(f"{video.where}: {videos / video.name} does not exist; put it there, or remove the line")
    for split in range(1, NUM_SPLITS + 1):
        parts: Counter[tuple[str, Part]] = Counter((video.action, video.splits[split - 1]) for video in listing.videos)
        if not any(part != "unused" for _, part in parts):
            continue
        for action in listing.actions:
            if not parts[action, "train"]:
                where = next((video.where for video in listing.videos if video.action == action), layout)
                lack = f"action {action!r} has no training video in split {split}"
                raise UserError(f"{where}: {lack}; give it one, or remove the action")
