"""The demo's report: one HTML file that needs nothing else, readable in light and dark and on paper."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_jobs.html_page import image, percent, table, write_page
from shards.clip_bytes import encode_jpeg
from tavlad import figures

_MANY_ACTIONS = 20
"""Above this, names are not listed and each confusion matrix takes the whole width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the demo and its wall time."""

    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Filmstrip:
    """A test video and what the best model says of it."""

    frames_THWC: NDArray[np.uint8]
    true_action: str
    predicted_action: str
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModel:
    """One trained and registered model. Accuracies are from 0 to 1, of the last epoch on the test part."""

    variant: str
    temporal: str
    split: int
    name: str
    version: str
    is_best: bool
    test_top1: float
    test_mean_class: float
    within_pair_top1: float | None
    """Share right when the choice is only between an action and its time-reversed partner."""
    confusion_AA: NDArray[np.int64]
    epochs: list[dict[str, Any]]
    run_url: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """All that the report shows."""

    dataset: str
    num_clips: int
    actions: tuple[str, ...]
    models: list[DemoModel]
    steps: list[Step]
    tracking_uri: str
    filmstrips: list[Filmstrip]


def write_report(path: Path, report: DemoReport) -> None:
    """Write the report; it appears whole."""
    minutes, seconds = divmod(round(sum(step.seconds for step in report.steps)), 60)
    sections = [
        f"<h1>tavlad: {html.escape(report.dataset)}</h1>",
        f"<p>{report.num_clips} clips of {len(report.actions)} actions{_names(report.actions)}. "
        f"{minutes} min {seconds} s in all.</p>",
        "<h2>Models</h2>",
        _models(report.models),
        _pair_note(report.models),
        "<h2>Test videos and what the best model says</h2>" if report.filmstrips else "",
        *map(_filmstrip, report.filmstrips),
        "<h2>Which actions are taken for which</h2><p>Clips of the test part, after the last epoch.</p>",
        _confusions(report),
        "<h2>Training</h2>",
        *map(_curves, report.models),
        "<h2>Where the time went</h2>",
        table(["step", "seconds"], [[html.escape(step.name), f"{step.seconds:.1f}"] for step in report.steps], {1}),
        _next_steps(report),
    ]
    write_page(path, f"tavlad: {report.dataset}", sections)


def _names(actions: Sequence[str]) -> str:
    return f" ({html.escape(', '.join(actions))})" if len(actions) <= _MANY_ACTIONS else ""


def _models(models: Sequence[DemoModel]) -> str:
    columns = ["variant", "temporal", "split", "test top-1", "mean class", "within pairs", "registered"]
    rows = [
        [
            html.escape(model.variant),
            html.escape(model.temporal),
            str(model.split),
            percent(model.test_top1),
            percent(model.test_mean_class),
            "–" if model.within_pair_top1 is None else percent(model.within_pair_top1),
            f'<a href="{html.escape(model.run_url)}">{html.escape(model.name)} v{html.escape(model.version)}</a>'
            + (" <b>best</b>" if model.is_best else ""),
        ]
        for model in models
    ]
    return table(columns, rows, {3, 4, 5})


def _pair_note(models: Sequence[DemoModel]) -> str:
    if all(model.within_pair_top1 is None for model in models):
        return ""
    return (
        "<p>The actions come in time-reversed pairs. <i>Within pairs</i> is the share of test clips told from their "
        "reversed partner: a model that sums over time is blind to order and can only guess (50 %).</p>"
    )


def _title(model: DemoModel) -> str:
    return f"<b>{html.escape(model.variant)}</b>, temporal = {html.escape(model.temporal)}"


def _confusions(report: DemoReport) -> str:
    shown = "".join(
        f"<figure><figcaption>{_title(model)}</figcaption>"
        + image(figures.png(figures.confusion_matrix(model.confusion_AA, report.actions)), "png", "confusion matrix")
        + "</figure>"
        for model in report.models
    )
    return f'<div class="beside">{shown}</div>' if len(report.actions) <= _MANY_ACTIONS else shown


def _curves(model: DemoModel) -> str:
    picture = image(figures.png(figures.training_curves(model.epochs)), "png", "training curves")
    return f"<figure><figcaption>{_title(model)}</figcaption>{picture}</figure>"


def _filmstrip(strip: Filmstrip) -> str:
    # A white gap of 4 pixels between the frames.
    framed_THWC = np.pad(strip.frames_THWC, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)
    row_HWC = np.concatenate(list(framed_THWC), axis=1)[:, :-4]
    jpeg = encode_jpeg(torch.from_numpy(row_HWC).permute(2, 0, 1).contiguous(), quality=85)
    is_right = strip.predicted_action == strip.true_action
    said = f"{html.escape(strip.predicted_action)} ({percent(strip.probability)})"
    return (
        f"<figure><figcaption>shows <b>{html.escape(strip.true_action)}</b>, predicted "
        f'<b class="{"right" if is_right else "wrong"}">{"" if is_right else "✗ "}{said}</b></figcaption>'
        f"{image(jpeg, 'jpeg', strip.true_action)}</figure>"
    )


def _next_steps(report: DemoReport) -> str:
    model = html.escape(report.models[0].name)
    return (
        "<h2>Going on</h2><ul>"
        f'<li>Compare the runs in MLflow: <a href="{html.escape(report.tracking_uri)}">'
        f"{html.escape(report.tracking_uri)}</a> (it answers while the services run; <code>tavlad up</code> starts "
        "them again)</li>"
        f"<li>Use the best model: <code>tavlad predict {model}@best VIDEO</code></li>"
        "<li>Train on videos of your own: <code>make demo VIDEOS=DIR</code>, a folder per action</li>"
        "<li>Stop the services: <code>tavlad down</code></li></ul>"
    )
