"""The demo's report: one HTML file that needs nothing else, readable in light and dark and on paper."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.clip_bytes import encode_jpeg
from tavlad import figures

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .9rem .3rem 0; }
th { border-bottom: 2px solid; } td { border-bottom: 1px solid #8884; } .number { text-align: right; }
img { max-width: 100%; background: white; } code { background: #8882; padding: .1rem .3rem; border-radius: .2rem; }
figure { margin: 0 0 1.2rem; break-inside: avoid; } .right { color: #2a7d3f; } .wrong { color: #c0392b; }
"""


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
    sections = [
        f"<h1>tavlad: {html.escape(report.dataset)}</h1>",
        f"<p>{report.num_clips} clips of {len(report.actions)} actions, "
        f"{sum(step.seconds for step in report.steps):.0f} s in all.</p>",
        "<h2>Models</h2>",
        _models(report.models),
        _pair_note(report.models),
        *(_model(model, report.actions) for model in report.models),
        "<h2>Test videos and what the best model says</h2>" if report.filmstrips else "",
        *map(_filmstrip, report.filmstrips),
        "<h2>Where the time went</h2>",
        _table(["step", "seconds"], [[html.escape(step.name), f"{step.seconds:.1f}"] for step in report.steps]),
        _next_steps(report),
    ]
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>tavlad: {html.escape(report.dataset)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _models(models: Sequence[DemoModel]) -> str:
    rows = [
        [
            html.escape(model.variant),
            html.escape(model.temporal),
            str(model.split),
            _percent(model.test_top1),
            _percent(model.test_mean_class),
            "–" if model.within_pair_top1 is None else _percent(model.within_pair_top1),
            f'<a href="{html.escape(model.run_url)}">{html.escape(model.name)} v{html.escape(model.version)}</a>'
            + (" <b>best</b>" if model.is_best else ""),
        ]
        for model in models
    ]
    return _table(["variant", "temporal", "split", "test top-1", "mean class", "within pairs", "registered"], rows)


def _pair_note(models: Sequence[DemoModel]) -> str:
    if all(model.within_pair_top1 is None for model in models):
        return ""
    return (
        "<p>The actions come in time-reversed pairs. <i>Within pairs</i> is the share of test clips told from their "
        "reversed partner: a model that sums over time is blind to order and can only guess (50 %).</p>"
    )


def _model(model: DemoModel, actions: tuple[str, ...]) -> str:
    pictures = {
        "Training": figures.training_curves(model.epochs),
        "Confusion on the test part": figures.confusion_matrix(model.confusion_AA, actions),
    }
    shown = "".join(f"<figure>{_image(figures.png(figure), 'png', name)}</figure>" for name, figure in pictures.items())
    return f"<h2>{html.escape(model.variant)}, temporal = {html.escape(model.temporal)}</h2>{shown}"


def _filmstrip(strip: Filmstrip) -> str:
    row_HWC = np.concatenate(list(strip.frames_THWC), axis=1)
    jpeg = encode_jpeg(torch.from_numpy(row_HWC).permute(2, 0, 1).contiguous(), quality=85)
    is_right = strip.predicted_action == strip.true_action
    said = f"{html.escape(strip.predicted_action)} ({_percent(strip.probability)})"
    return (
        f"<figure>{_image(jpeg, 'jpeg', strip.true_action)}<figcaption>shows <b>{html.escape(strip.true_action)}</b>, "
        f'predicted <b class="{"right" if is_right else "wrong"}">{said}</b></figcaption></figure>'
    )


def _next_steps(report: DemoReport) -> str:
    model = html.escape(report.models[0].name)
    return (
        "<h2>Going on</h2><ul>"
        f'<li>Compare the runs in MLflow: <a href="{html.escape(report.tracking_uri)}">'
        f"{html.escape(report.tracking_uri)}</a></li>"
        f"<li>Use the best model: <code>tavlad predict {model}@best VIDEO</code></li>"
        "<li>Train on videos of your own: <code>make demo VIDEOS=DIR</code>, a folder per action</li>"
        "<li>Stop the services: <code>tavlad down</code></li></ul>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _image(data: bytes, kind: str, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
