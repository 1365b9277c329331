"""Renders the demo's videos: labelled H.264 files in pairs of actions that only the order of events tells apart.

`python -m shards.render DIRECTORY` writes them, `--contact-sheet FILE` a picture of all actions. What the videos show
is in shards/scenes.py.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from shards.contact_sheet import contact_sheet
from shards.index import NUM_SPLITS
from shards.scenes import MOTION_PAIR, PAIRS, render_clip
from tavlad.errors import UserError

FRAME_RATES = (15, 20, 25)
"""Frames a second; each video has one of these."""
_FORMAT = 1
# One quantiser for all frames: a better first frame would betray where a video starts, and x264's rate control (crf)
# was seen to give other bytes in other runs.
_ENCODER_OPTIONS: dict[str, object] = {
    "preset": "veryfast",
    "qp": "23",
    "x264-params": "ipratio=1:pbratio=1",
    "threads": "1",
}
_OPTIONS_NAME = "rendered.json"
_TABLE_NAME = "videos.csv"


def render_videos(
    directory: Path,
    clips_per_action: int,
    seed: int,
    size: tuple[int, int] = (192, 144),
    progress: Callable[[int, int], None] | None = None,
    *,
    num_samples: int = 16,
    with_motion_pair: bool = False,
) -> None:
    """Write DIRECTORY/ACTION/ACTION_NUMBER.mp4 and the table DIRECTORY/videos.csv (path, action, split1..3, group).

    Every file is a function of its action, number and the seed alone, appears whole, and is kept when it exists, so a
    render that was stopped goes on. `size` is width and height in pixels; the models that will see the videos sample
    `num_samples` frames (shards/scenes.py says why that matters). `progress(done, total)` counts videos. A split tests
    every third number of each action; videos of one number are a group, so a group is never split.
    ValueError: too few clips, a negative seed, an odd or tiny size, or a directory that holds anything else.
    """
    if clips_per_action < NUM_SPLITS:
        raise UserError(
            f"Cannot render {clips_per_action} videos an action: {NUM_SPLITS} or more are needed, "
            f"so that each of the {NUM_SPLITS} splits has one to test."
        )
    if seed < 0:
        raise UserError(f"Cannot render with the seed {seed}: it must be 0 or more.")
    if any(side < 32 or side % 2 for side in size):
        raise UserError(f"Cannot render videos of {size[0]}x{size[1]} pixels: both sides must be even and at least 32.")
    _claim(directory, {"format": _FORMAT, "seed": seed, "size": list(size), "num_samples": num_samples})
    actions = [action for pair in (*PAIRS, *([MOTION_PAIR] if with_motion_pair else [])) for action in pair]
    rows: list[list[str]] = []
    for number in range(clips_per_action):
        for action in actions:
            path = directory / action / f"{action}_{number:03d}.mp4"
            if not path.exists():
                _write_whole(path, _render_file(action, seed, number, size, num_samples))
            splits = ["test" if number % NUM_SPLITS == split else "train" for split in range(NUM_SPLITS)]
            rows.append([path.relative_to(directory).as_posix(), action, *splits, f"g{number:03d}"])
            if progress is not None:
                progress(len(rows), clips_per_action * len(actions))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "action", *(f"split{split + 1}" for split in range(NUM_SPLITS)), "group"])
    writer.writerows(sorted(rows))
    _write_whole(directory / _TABLE_NAME, table.getvalue().encode())


def _render_file(action: str, seed: int, number: int, size: tuple[int, int], num_samples: int) -> bytes:
    # Every video has its own stream of draws, so it stays the same whatever else is rendered.
    name = int.from_bytes(hashlib.sha256(action.encode()).digest()[:8], "big")
    frame_rate = FRAME_RATES[np.random.default_rng([seed, name, number]).integers(len(FRAME_RATES))]
    return encode_video(render_clip(action, [seed, name, number, 1], size, num_samples), frame_rate)


def encode_video(frames_THWC: NDArray[np.uint8], frames_per_second: int) -> bytes:
    """The frames as an MP4 file with one H.264 stream; the same frames give the same bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = _ENCODER_OPTIONS
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _claim(directory: Path, options: dict[str, object]) -> None:
    """Note in the directory how its videos are rendered; ValueError when they were rendered otherwise, or by others."""
    note = directory / _OPTIONS_NAME
    if note.exists():
        found = json.loads(note.read_text())
        if found != options:
            raise UserError(
                f"{directory} holds videos rendered with {_describe(found)}, not with {_describe(options)}: "
                "choose another folder or delete this one."
            )
    elif directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise UserError(f"{directory} holds files that were not rendered here: choose an empty folder.")
    else:
        _write_whole(note, json.dumps(options).encode())


def _describe(options: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when all is written, 2 with one sentence on stderr when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m shards.render", description="Render labelled videos for the demo.")
    parser.add_argument("directory", nargs="?", type=Path, help="write ACTION/ACTION_NUMBER.mp4 and videos.csv here")
    parser.add_argument("--clips-per-action", type=int, default=30, metavar="N", help="default 30")
    parser.add_argument("--seed", type=int, default=0, help="default 0; the same seed gives the same files")
    parser.add_argument("--with-motion-pair", action="store_true", help="also move_right and move_left")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="a picture with one video of each action")
    chosen = parser.parse_args(arguments)
    if chosen.directory is None and chosen.contact_sheet is None:
        parser.error("name a directory for the videos, or --contact-sheet PNG")
    try:
        if chosen.directory is not None:
            motion: bool = chosen.with_motion_pair
            render_videos(chosen.directory, chosen.clips_per_action, chosen.seed, with_motion_pair=motion)
        if chosen.contact_sheet is not None:
            _write_whole(chosen.contact_sheet, contact_sheet(chosen.seed))
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
