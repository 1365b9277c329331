"""report.html and report.json of a reproduction: our numbers beside the paper's, and in words what departs from it."""

import html
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray_jobs.html_page import image, percent, table, write_page
from ray_jobs.published import PublishedRow, paper_set
from tavlad import figures

_SOURCE = "Sudhakaran and Lanz, Top-down Attention Recurrent VLAD Encoding for Action Recognition in Videos, 2018"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a training came to. Accuracies are from 0 to 1, on the test part."""

    training: str
    """The training's name, which is a fingerprint of all that decides it."""
    top1: float
    """Of the last epoch: the result."""
    mean_class: float
    best_on_test: float | None
    """The highest of any epoch: chosen on the test part, so not a result. None for what has no epochs."""
    num_test_clips: int
    epochs: int
    wall_seconds: float
    """Of the command that ended it, codebook to registered model; less than all of it if it was resumed."""
    model: str
    """The registered model; empty for what is no network."""
    run_url: str
    history: list[dict[str, Any]]
    """One row an epoch; empty for what has none."""
    code: str = ""
    """The code that trained it; empty for a fusion, whose parts say theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One training of a reproduction."""

    row: PublishedRow
    dataset: str
    split: int
    outcome: Outcome | None = None
    """None as long as it is not done."""
    failure: str = ""
    """Why it could not be done."""

    @property
    def trained_on(self) -> str:
        """The packed set of its training, with the same videos and splits as `dataset`."""
        return self.dataset if self.row.modality == "rgb" else f"{self.dataset}-{self.row.modality}"

    @property
    def paper(self) -> float | None:
        """The paper's accuracy of this split in %, where it gives one."""
        dataset = paper_set(self.dataset)
        splits = self.row.splits.get(dataset, []) if dataset is not None else []
        return splits[self.split - 1] if len(splits) >= self.split else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """All that the report shows."""

    table: Literal[1, 2]
    datasets: list[str]
    entries: list[Entry]
    departures: list[str]
    """In words, what was not run as in the paper."""
    tracking_uri: str


def write_reproduction(folder: Path, report: Reproduction) -> dict[str, Any]:
    """Write both files; they appear whole. Returns what report.json holds."""
    document = _document(report)
    write_page(folder / "report.html", f"tavlad: Table {report.table}", _sections(report))
    partial = folder / ".report.json.partial"
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / "report.json")
    return document


def _document(report: Reproduction) -> dict[str, Any]:
    return {
        "table": report.table,
        "source": _SOURCE,
        "departures": report.departures,
        "done": sum(entry.outcome is not None for entry in report.entries),
        "trainings": [
            {
                "row": entry.row.name,
                "recipe": entry.row.recipe,
                "ours_differs": entry.row.ours,
                "dataset": entry.dataset,
                "split": entry.split,
                "paper_top1": None if entry.paper is None else entry.paper / 100,
                "difference": _difference(entry),
                "failure": entry.failure or None,
                **({} if entry.outcome is None else asdict(entry.outcome)),
            }
            for entry in report.entries
        ],
        "averages": [
            {"row": row.name, "dataset": dataset, "top1": ours, "paper_top1": None if paper is None else paper / 100}
            for row, dataset, ours, paper in _averages(report)
        ],
    }


def _difference(entry: Entry) -> float | None:
    if entry.outcome is None or entry.paper is None:
        return None
    return entry.outcome.top1 - entry.paper / 100


def _averages(report: Reproduction) -> list[tuple[PublishedRow, str, float, float | None]]:
    """(row, set, our average over the three splits from 0 to 1, the paper's in %) of the rows with all splits done."""
    found: list[tuple[PublishedRow, str, float, float | None]] = []
    for dataset in report.datasets:
        by_row: dict[str, list[Entry]] = {}
        for entry in report.entries:
            if entry.dataset == dataset:
                by_row.setdefault(entry.row.name, []).append(entry)
        for entries in by_row.values():
            outcomes = [entry.outcome for entry in entries if entry.outcome is not None]
            if len(outcomes) == len(entries) == 3:
                average = sum(outcome.top1 for outcome in outcomes) / 3
                paper = entries[0].row.accuracy.get(paper_set(dataset) or "")
                found.append((entries[0].row, dataset, average, paper))
    return found


def _sections(report: Reproduction) -> list[str]:
    num_done = sum(entry.outcome is not None for entry in report.entries)
    what = "HMDB51 split 1" if report.table == 1 else "the average of three splits"
    sections = [
        f"<h1>Table {report.table}: {html.escape(', '.join(report.datasets))}</h1>",
        f"<p>{num_done} of {len(report.entries)} trainings are done. The paper's numbers are for {what}: "
        f"{html.escape(_SOURCE)}.</p>",
        _departures(report),
    ]
    if report.table == 2:
        sections += ["<h2>Average over the splits</h2>", _average_table(report)]
    sections += [
        "<h2>Trainings</h2>",
        "<p>The result is the accuracy after the last epoch. The best of any epoch is chosen on the test part and is "
        "no result; it is shown because others report it.</p>",
        _training_table(report),
        _codes(report),
        *map(_curves, report.entries),
        f'<p>Compare the runs in MLflow: <a href="{html.escape(report.tracking_uri)}">'
        f"{html.escape(report.tracking_uri)}</a></p>",
    ]
    return sections


def _departures(report: Reproduction) -> str:
    if not report.departures:
        return "<p>Run in full, as the paper describes it.</p>"
    words = "; ".join(html.escape(words) for words in report.departures)
    return f"<p><b>This is not the paper's training: {words}. Its numbers are not comparable to the paper's.</b></p>"


def _codes(report: Reproduction) -> str:
    """Said in any case, and loudly where numbers of several versions of the code stand beside each other."""
    codes = sorted({entry.outcome.code for entry in report.entries if entry.outcome is not None and entry.outcome.code})
    if len(codes) < 2:
        return f"<p>Code: {html.escape(codes[0])}.</p>" if codes else ""
    return f"<p><b>Trained by {len(codes)} versions of the code</b>: {html.escape('; '.join(codes))}.</p>"


def _training_table(report: Reproduction) -> str:
    columns = [
        *("row", "set", "split", "ours, last epoch", "best on test (no result)", "paper", "difference"),
        *("test clips", "wall time", "MLflow"),
    ]
    return table(columns, [_training_row(entry) for entry in report.entries], {3, 4, 5, 6, 7, 8})


def _training_row(entry: Entry) -> list[str]:
    name = _name(entry.row)
    paper = "–" if entry.paper is None else percent(entry.paper / 100)
    first = [name, html.escape(entry.dataset), str(entry.split)]
    outcome, difference = entry.outcome, _difference(entry)
    if outcome is None:
        reason = html.escape(entry.failure) if entry.failure else "not done yet"
        return [*first, "–", "–", paper, "–", "–", "–", reason]
    return [
        *first,
        f"<b>{percent(outcome.top1)}</b>",
        "–" if outcome.best_on_test is None else percent(outcome.best_on_test),
        paper,
        "–" if difference is None else f"{100 * difference:+.1f}",
        str(outcome.num_test_clips),
        _duration(outcome.wall_seconds),
        _link(outcome),
    ]


def _name(row: PublishedRow) -> str:
    return html.escape(row.name) + (f"<br><small>ours: {html.escape(row.ours)}</small>" if row.ours else "")


def _average_table(report: Reproduction) -> str:
    rows = [
        [
            _name(row),
            html.escape(row.backbone),
            html.escape(dataset),
            f"<b>{percent(ours)}</b>",
            "–" if paper is None else percent(paper / 100),
            "–" if paper is None else f"{100 * ours - paper:+.1f}",
        ]
        for row, dataset, ours, paper in _averages(report)
    ]
    return table(["method", "the paper's backbone", "set", "ours", "paper", "difference"], rows, {3, 4, 5})


def _curves(entry: Entry) -> str:
    if entry.outcome is None or not entry.outcome.history:
        return ""
    picture = image(figures.png(figures.training_curves(entry.outcome.history)), "png", "training curves")
    title = f"<b>{html.escape(entry.row.name)}</b>, {html.escape(entry.dataset)}, split {entry.split}"
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"


def _link(outcome: Outcome) -> str:
    """To its run; a fusion has none."""
    name = html.escape(outcome.model or "run")
    return f'<a href="{html.escape(outcome.run_url)}">{name}</a>' if outcome.run_url else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
