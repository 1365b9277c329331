"""tavlad predict: the actions in video files, by a registered model or one in a directory. Needs no cluster."""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_jobs.attention_video import write_attention_video
from ray_jobs.clips import UnusableVideo, Windows
from ray_jobs.console import Console
from ray_jobs.models import fetch_model
from ray_jobs.served_model import Answer, ServedModel
from shards.scratch import scratch
from shards.table import TableWriter
from tavlad.errors import UserError

_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv", ".3gp", ".flv", ".ts"}
_COLUMNS = {"video": str, "start": float, "end": float, "rank": int, "action": str, "probability": float}
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions:
    """What to make of the videos."""

    top: int = 5
    windows: Windows | None = None
    attention: Path | None = None
    """Video file, or folder of them for several videos, to draw the attention into."""
    json_lines: Path | None = None
    """File for one JSON object a row."""
    parquet: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What came of it. Rows are kept only when no file takes them."""

    num_videos: int
    num_rows: int
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    failures: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def predict_videos(
    tracking_uri: str, model: str, videos: Sequence[Path], options: PredictOptions, console: Console
) -> Predicted:
    """The top actions of each video, or of each of its windows; a video that cannot be used is reported at its turn."""
    with scratch() as folder:
        served = ServedModel(fetch_model(tracking_uri, model, folder / "model"))
    if options.attention is not None and options.attention.suffix and len(videos) > 1:
        raise UserError(f"{options.attention} holds the attention of one video: name a folder for {len(videos)}")
    rows: list[dict[str, Any]] = []
    failures: list[tuple[str, str]] = []
    num_rows, num_begun, current = 0, 0, ""
    with ExitStack() as stack:
        sinks = _sinks(stack, options) or [rows.append]
        advance = stack.enter_context(console.progress("videos", len(videos)))
        for answer in served.answers(videos, options.top, windows=options.windows, attention=bool(options.attention)):
            video = answer.video if isinstance(answer, UnusableVideo) else answer.clip.video
            if video != current:
                advance(num_begun, "")
                num_begun, current = num_begun + 1, video
            if isinstance(answer, UnusableVideo):
                console.say(f"not predicted: {answer.video}: {answer.reason}")
                failures.append((answer.video, answer.reason))
                continue
            for row in _rows_of(answer, timeline=options.windows is not None):
                num_rows += 1
                for sink in sinks:
                    sink(row)
            if options.attention is not None:
                _draw(answer, options.attention)
        advance(len(videos), "")
    return Predicted(num_videos=len(videos), num_rows=num_rows, rows=rows, failures=failures)


def find_videos(named: Sequence[str]) -> list[Path]:
    """The videos of paths, folders (all below them that end like a video) and patterns, each once, in order.

    ValueError names the first that holds none; a path of a file is taken as it is, even if it does not exist.
    """
    found: dict[Path, None] = {}
    for text in named:
        path = Path(text)
        if path.is_dir():
            here = sorted(each for each in path.rglob("*") if each.suffix.lower() in _SUFFIXES and each.is_file())
            if not here:
                raise UserError(f"{path} holds no video: none of its files ends in {', '.join(sorted(_SUFFIXES))}")
        elif not path.exists() and glob.has_magic(text):
            here = sorted(Path(each) for each in glob.glob(text, recursive=True))  # noqa: PTH207 - absolute ones too
            if not here:
                raise UserError(f"no file matches {text}: correct the pattern, or name a folder")
        else:
            here = [path]
        found |= dict.fromkeys(here)
    return list(found)


def seconds_of(text: str) -> float:
    """Seconds of "4s", "500ms", "1m" or "4"; ValueError for anything else, or what is not above 0.

    >>> seconds_of("4s"), seconds_of("500ms"), seconds_of("2")
    (4.0, 0.5, 2.0)
    """
    number = text.strip().rstrip("ms")
    unit = _UNITS.get(text.strip()[len(number) :] or "s")
    try:
        seconds = float(number) * unit if unit else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{text!r} is no length of time: write seconds above 0, such as 4s, 500ms or 1m")
    return seconds


def _rows_of(answer: Answer, *, timeline: bool) -> Iterator[dict[str, Any]]:
    times = {"start": answer.clip.start, "end": answer.clip.end} if timeline else {}
    for each in answer.predictions:
        said = {"rank": each.rank, "action": each.action, "probability": each.probability}
        yield {"video": each.video, **times, **said}


def _sinks(stack: ExitStack, options: PredictOptions) -> list[Callable[[dict[str, Any]], object]]:
    sinks: list[Callable[[dict[str, Any]], object]] = []
    if options.parquet is not None:
        columns = {
            name: kind for name, kind in _COLUMNS.items() if options.windows is not None or name not in ("start", "end")
        }
        sinks.append(stack.enter_context(TableWriter(options.parquet, columns)).add)
    if options.json_lines is not None:
        options.json_lines.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(options.json_lines.open("w", encoding="utf-8"))
        sinks.append(lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n"))
    return sinks


def _draw(answer: Answer, place: Path) -> None:
    assert answer.attention_Thw is not None, "it was asked for"
    if not place.suffix:
        stem = "-".join(Path(answer.clip.video).parts[-2:])
        place = place / f"{Path(stem).stem}.mp4"
    write_attention_video(place, answer.clip.frames_TCHW, answer.attention_Thw, answer.predictions[0])
