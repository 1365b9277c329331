"""Split files of HMDB51 and UCF101, and tables: which video is in which part of which split. Needs no video."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from shards.index import NUM_SPLITS, Part, Splits
from tavlad.errors import UserError

_HMDB51_FILE = re.compile(r"(?P<action>.+)_test_split(?P<split>[1-3])\.txt")
_HMDB51_PARTS: Mapping[str, Part] = {"0": "unused", "1": "train", "2": "test"}
_GroupOf = Callable[[str, str], str]
_PARTS: tuple[Part, ...] = ("train", "test", "unused")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedVideo:
    """A video as the split files name it."""

    name: str
    """Path below the videos folder, with `/`."""
    action: str
    splits: Splits
    group: str
    """Clips of one group come from one recording: they are never on both sides of a fair split."""
    where: str
    """`FILE:LINE` that names it first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All that a set's split files say."""

    actions: tuple[str, ...]
    """In label order."""
    videos: tuple[ListedVideo, ...]

    def count(self, split: int, part: Part) -> int:
        """Videos in a part of split 1, 2 or 3."""
        return sum(video.splits[split - 1] == part for video in self.videos)


def read_hmdb51(folder: Path) -> Listing:
    """`ACTION_test_splitK.txt` files with lines `NAME.avi ID`, ID 1 train, 2 test, 0 unused; actions sorted by name."""
    files = {path: match for path in sorted(_folder(folder).iterdir()) if (match := _HMDB51_FILE.fullmatch(path.name))}
    if not files:
        nested = next(folder.glob("*/*_test_split1.txt"), None)
        hint = f"they are in {nested.parent}" if nested else "give the folder of HMDB51's split files"
        raise UserError(f"{folder} holds no ACTION_test_splitK.txt files: {hint}")
    roster = _Roster()
    for path, match in files.items():
        for where, line in _lines(path):
            name, _, code = line.rpartition(" ")
            if code not in _HMDB51_PARTS or not name.strip():
                raise UserError(f"{where}: expected 'NAME.avi ID' with ID 0, 1 or 2, found {line!r}; correct the line")
            action = match["action"]
            roster.add(f"{action}/{name.strip()}", action, int(match["split"]), _HMDB51_PARTS[code], where)
    return roster.listing(sorted({match["action"] for match in files.values()}), _hmdb51_group)


def read_ucf101(folder: Path) -> Listing:
    """`trainlist0K.txt`: `ACTION/NAME.avi LABEL`; `testlist0K.txt`: `ACTION/NAME.avi`; `classInd.txt`: `LABEL ACTION`.

    Labels in the files count from 1; the label order is theirs.
    """
    labels = _ucf101_labels(_folder(folder) / "classInd.txt")
    roster = _Roster()
    for split in range(1, NUM_SPLITS + 1):
        lists = {part: folder / f"{part}list0{split}.txt" for part in ("train", "test")}
        missing = [path.name for path in lists.values() if not path.is_file()]
        if missing == [path.name for path in lists.values()] and split > 1:
            continue
        if missing:
            raise UserError(f"{folder} has no {missing[0]}: give the folder of UCF101's split files, whole")
        for part, path in lists.items():
            for where, line in _lines(path):
                name, label = _ucf101_line(line)
                action = name.partition("/")[0]
                if action not in labels or "/" not in name:
                    raise UserError(f"{where}: {action!r} is no action of classInd.txt; add it, or correct the line")
                if (part == "train" or label) and label != labels[action]:
                    raise UserError(
                        f"{where}: {action!r} has label {label or 'none'}, but {labels[action]} in classInd.txt; "
                        "make them agree"
                    )
                roster.add(name, action, split, cast(Part, part), where)
    return roster.listing(sorted(labels, key=lambda action: int(labels[action])), _ucf101_group)


def read_table_of_videos(path: Path) -> Listing:
    """A CSV or Parquet table: `path` below the videos folder, `action`, `split` or `split1`.. `split3`, maybe `group`.

    Parts are written train, test or unused; `split` means `split1`, and splits without a column are unused.
    """
    columns, rows = _table_rows(path)
    splits = {1: "split"} if "split" in columns else {k: f"split{k}" for k in (1, 2, 3) if f"split{k}" in columns}
    if "split" in columns and any(f"split{k}" in columns for k in (1, 2, 3)):
        raise UserError(f"{path} has a column 'split' and numbered ones: rename 'split' to 'split1', or remove it")
    for needed in ("path", "action", *(() if splits else ("split1",))):
        if needed not in columns:
            raise UserError(f"{path} has no column {needed!r} (it has {', '.join(columns)}): name the columns so")
    roster = _Roster()
    groups: dict[str, str] = {}
    for where, row in rows:
        name, action = PurePosixPath(row["path"]).as_posix(), row["action"]
        if not row["path"] or not action:
            raise UserError(f"{where}: path or action is empty; fill both in")
        for split, column in splits.items():
            if row[column] not in _PARTS:
                raise UserError(f"{where}: {column} is {row[column]!r}; write train, test or unused")
            roster.add(name, action, split, cast(Part, row[column]), where)
        groups[name] = row.get("group") or str(PurePosixPath(name).with_suffix(""))
    return roster.listing(sorted({video[0] for video in roster.named.values()}), lambda name, _: groups[name])


class _Roster:
    """Videos in the order they are first named, and what each split says of them."""

    def __init__(self) -> None:
        self.named: dict[str, tuple[str, str]] = {}
        self._parts: dict[str, dict[int, tuple[Part, str]]] = {}

    def add(self, name: str, action: str, split: int, part: Part, where: str) -> None:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{where}: {name!r} leaves the videos folder; name videos by their path below it")
        self.named.setdefault(name, (action, where))
        parts = self._parts.setdefault(name, {})
        if split in parts:
            raise UserError(f"{where}: {name} is already in split {split} ({parts[split][1]}); remove one of the lines")
        parts[split] = (part, where)

    def listing(self, actions: Sequence[str], group_of: _GroupOf) -> Listing:
        videos = [
            ListedVideo(
                name=name,
                action=action,
                splits=cast(Splits, tuple(self._part(name, split) for split in (1, 2, 3))),
                group=group_of(name, action),
                where=where,
            )
            for name, (action, where) in self.named.items()
        ]
        return Listing(actions=tuple(actions), videos=tuple(sorted(videos, key=lambda video: video.name)))

    def _part(self, name: str, split: int) -> Part:
        return self._parts[name].get(split, ("unused", ""))[0]


def _hmdb51_group(name: str, action: str) -> str:
    """The source video: `NAME_ACTION_visible-parts_camera_people_view_quality_number` without all after NAME."""
    stem = PurePosixPath(name).stem
    scheme = rf"(.+)_{re.escape(action)}_[fhlu]_(?:cm|nm)_np\d+_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+"
    match = re.fullmatch(scheme, stem)
    return match[1] if match else stem


def _ucf101_group(name: str, action: str) -> str:
    """`v_ACTION_gNN_cNN` -> `ACTION_gNN`: groups are numbered within their action."""
    match = re.fullmatch(r".+_(g\d+)_c\d+", PurePosixPath(name).stem)
    return f"{action}_{match[1]}" if match else str(PurePosixPath(name).with_suffix(""))


def _ucf101_labels(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: give the folder of UCF101's split files, whole")
    labels: dict[str, str] = {}
    for where, line in _lines(path):
        label, _, action = line.partition(" ")
        if not label.isdecimal() or not action.strip() or action.strip() in labels or label in labels.values():
            raise UserError(f"{where}: expected 'LABEL ACTION', each once, found {line!r}; correct the line")
        labels[action.strip()] = label
    return labels


def _ucf101_line(line: str) -> tuple[str, str]:
    """Name, and label if there is one."""
    name, _, label = line.rpartition(" ")
    return (name.strip(), label) if name and label.isdecimal() else (line, "")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """`FILE:LINE` and text of the lines that are not blank. Names that are not UTF-8 come as the file system's do."""
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    return ((f"{path}:{number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip())


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of the split files")
    return folder


def _table_rows(path: Path) -> tuple[Sequence[str], Iterable[tuple[str, dict[str, str]]]]:
    """Column names, and (`FILE:LINE`, row) for each row, all values as text."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a .csv or .parquet table of videos")
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except pa.ArrowException as error:
            raise UserError(f"{path} is not a Parquet file ({error}); write it again") from error
        rows = [{name: "" if value is None else str(value) for name, value in row.items()} for row in table.to_pylist()]
        return table.column_names, [(f"{path}: row {number}", row) for number, row in enumerate(rows, start=1)]
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, restval="")
        try:
            columns = list(reader.fieldnames or ())
            rows = [(f"{path}:{reader.line_num}", {name: row[name].strip() for name in columns}) for row in reader]
        except csv.Error as error:
            raise UserError(
                f"{path}:{reader.line_num + 1} is no line of a CSV table ({error}); write it again"
            ) from error
        return columns, rows
