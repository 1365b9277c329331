"""HMDB51's whole protocol on stand-in videos: `make rehearse-hmdb51`, or `python -m tests.rehearse_hmdb51 [FOLDER]`.

The official split files name 6,766 videos of 51 actions; each is rendered in its place, tiny: a square in its action's
colour, moving in its action's direction. They are packed, and `tavlad reproduce` trains TA-VLAD on all three splits, an
epoch a stage, to the row of Table 2; its report says what departs from the paper. It must hold that every split's
test part had its 1,530 clips, that the average is that of three, and that the same command again does no work.
Run again with the same FOLDER it goes on. About a quarter of an hour on 2 CPU cores.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console

SPLITS = Path(__file__).parents[1] / "../shared/data/splits/hmdb51/testTrainMulti_7030_splits"
NAME = "hmdb51-standin"
WIDTH, HEIGHT, NUM_FRAMES = 64, 48, 12
PACKED_FRAMES, CROP = 3, 48
CHANGES = (
    *("--set", "model.trunk=efficientnet_lite0", "--set", f"training.crop={CROP}", "--set", "training.num_views=1"),
    *("--set", "model.num_clusters=4", "--set", "model.gru_width=16", "--epochs-scale", "0.02"),
)
_OUT = Console(width=160)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearse_hmdb51", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="what it makes (default: a temporary folder, kept)")
    parser.add_argument("--splits", type=Path, default=SPLITS, help="the official split files")
    options = parser.parse_args()
    if not options.splits.is_dir():
        _OUT.print(f"error: no split files at {options.splits}: name their folder with --splits")
        return 2
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="tavlad-hmdb51-"))
    began = time.monotonic()
    render(folder / "videos", options.splits)
    _OUT.print(f"rendered in {time.monotonic() - began:.0f} s: {folder / 'videos'}")
    home = folder / "state"
    flags = ("--layout", "hmdb51", "--splits", str(options.splits), "--short-side", str(HEIGHT))
    try:
        tavlad(home, "pack", str(folder / "videos"), "--name", NAME, *flags, "--num-frames", str(PACKED_FRAMES))
        reproduce = ("reproduce", NAME, "--table", "2", "--rows", "ta-vlad", *CHANGES, "--to", str(folder / "report"))
        tavlad(home, *reproduce)
        _OUT.print(f"reproduced after {time.monotonic() - began:.0f} s")
        first = json.loads((folder / "report" / "report.json").read_text())
        again = time.monotonic()
        tavlad(home, *reproduce)
        _OUT.print(f"the same again: {time.monotonic() - again:.0f} s")
        check(first, json.loads((folder / "report" / "report.json").read_text()), folder / "report" / "report.html")
    finally:
        tavlad(home, "down")
    _OUT.print(f"all of it held; {time.monotonic() - began:.0f} s; {folder / 'report' / 'report.html'}")
    return 0


def render(videos: Path, splits: Path) -> None:
    """Every video that the split files name, in its action's folder."""
    actions = sorted({path.name.rpartition("_test_split")[0] for path in splits.glob("*_test_split1.txt")})
    paths = [
        (videos / action / line.split()[0], label)
        for label, action in enumerate(actions)
        for line in (splits / f"{action}_test_split1.txt").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    for action in actions:
        (videos / action).mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as processes:
        list(processes.map(_write, paths, chunksize=64))


def _write(wanted: tuple[Path, int]) -> None:
    path, label = wanted
    if not path.exists():
        partial = path.with_suffix(".part")
        partial.write_bytes(_video(path.name, label))
        partial.replace(path)


def _video(name: str, label: int) -> bytes:
    """An AVI file, a function of its name and its action."""
    draws = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    colour = np.array([label % 4, label // 4 % 4, label // 16], dtype=np.uint8) * 80
    angle = 2 * np.pi * label / 51
    start = draws.uniform(0.3, 0.7, 2) * (HEIGHT, WIDTH)
    background = draws.integers(100, 156, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(NUM_FRAMES):
            row, column = (start + number * np.array([np.sin(angle), np.cos(angle)])).astype(int)
            picture = background.copy()
            picture[max(0, row - 10) : row + 10, max(0, column - 10) : column + 10] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def tavlad(home: Path, *words: str) -> None:
    """A verb, with a local site of its own."""
    command = [str(Path(sys.executable).with_name("tavlad")), *words]
    subprocess.run(command, check=True, env=os.environ | {"TAVLAD_HOME": str(home)})


def check(first: dict[str, Any], second: dict[str, Any], page: Path) -> None:
    """What must hold of the two reports."""
    trainings = first["trainings"]
    assert [row["split"] for row in trainings] == [1, 2, 3], trainings
    assert [row["num_test_clips"] for row in trainings] == [1530] * 3, trainings
    assert [row["paper_top1"] for row in trainings] == [0.561, 0.524, 0.537], "HMDB51's numbers stand beside ours"
    (average,) = first["averages"]
    assert abs(average["top1"] - sum(row["top1"] for row in trainings) / 3) < 1e-9
    assert average["paper_top1"] == 0.541
    assert first["departures"], "a rehearsal says that it is one"
    assert "not the paper" in page.read_text(encoding="utf-8")
    assert first == second, "the same command again found all of it"
    chance = 1 / 51
    for row in trainings:
        _OUT.print(
            f"split {row['split']}: test top-1 {row['top1']:.1%} (chance {chance:.1%}), {row['wall_seconds']:.0f} s"
        )
    _OUT.print(f"average: {average['top1']:.1%}")


if __name__ == "__main__":
    sys.exit(main())
