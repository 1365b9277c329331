"""What one training came to, as one HTML file: its curves, every action, and what it confuses, with pictures of it."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ray_jobs.html_page import image, percent, table, write_page
from shards.clip_bytes import encode_jpeg
from tavlad import figures
from tavlad.metrics import Scores

_CONFUSIONS = 10
_CLIPS_OF_A_CONFUSION = 3
_FRAMES_OF_A_STRIP = 3
_FEW_ACTIONS = 20
_PIXELS = 112
"""Side of a thumbnail, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """All that the page shows of a training."""

    name: str
    facts: Mapping[str, str]
    """What to say of it at the top, by name."""
    actions: tuple[str, ...]
    history: Sequence[Mapping[str, Any]]
    """One row an epoch: stage, epoch and metrics."""
    scores: Scores
    """Of the last epoch, on the test part."""
    recipe: Mapping[str, object]
    """Every field."""
    links: Mapping[str, str]
    """Addresses by what is there."""
    frames_of: Callable[[str], UInt8[Tensor, "T 3 H W"]]
    """The frames of a test clip, by its key."""
    attention_png: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """An action and what it is taken for."""

    true: int
    predicted: int
    rows: tuple[int, ...]
    """Of the scores: clips of it, the surest mistake first."""


def write_run_report(path: Path, report: RunReport) -> None:
    """Write the page; it appears whole."""
    is_wide = len(report.actions) > _FEW_ACTIONS
    matrix = image(figures.png(figures.confusion_matrix(report.scores.confusion, report.actions)), "png", "confusions")
    bars = image(figures.png(figures.per_action_bars(report.scores.confusion, report.actions)), "png", "accuracies")
    sections = [
        f"<h1>{html.escape(report.name)}</h1>",
        table(["fact", "value"], [[html.escape(name), html.escape(value)] for name, value in report.facts.items()]),
        _links(report.links),
        "<h2>Training</h2>",
        image(figures.png(figures.training_curves(report.history)), "png", "training curves"),
        "<h2>Hardest confusions</h2>",
        _confusions(report),
        "<h2>Every action</h2>",
        f'<div class="wide">{bars}</div>',
        _actions(report),
        "<h2>Which actions are taken for which</h2><p>Clips of the test part, after the last epoch.</p>",
        f'<div class="wide">{matrix}</div>' if is_wide else matrix,
    ]
    if report.attention_png is not None:
        sections += [
            "<h2>Where it looks</h2>",
            f'<div class="wide">{image(report.attention_png, "png", "attention")}</div>',
        ]
    settings = [[html.escape(name), html.escape(str(value))] for name, value in report.recipe.items()]
    sections += [
        "<h2>Recipe</h2>",
        f"<details><summary>{len(settings)} fields</summary>{table(['field', 'value'], settings)}</details>",
    ]
    write_page(path, report.name, sections)


def hardest_confusions(scores: Scores, most: int = _CONFUSIONS) -> list[Confusion]:
    """The pairs (true, predicted) with the most clips; of equal ones first where they are more of the action's."""
    wrong_AA = scores.confusion.copy()
    np.fill_diagonal(wrong_AA, 0)
    clips_A = np.maximum(1, scores.confusion.sum(axis=1))
    pairs = [(int(true), int(predicted)) for true, predicted in np.argwhere(wrong_AA > 0)]
    pairs.sort(key=lambda pair: (-wrong_AA[pair], -wrong_AA[pair] / clips_A[pair[0]], pair))
    found: list[Confusion] = []
    for true, predicted in pairs[:most]:
        rows = np.flatnonzero((scores.labels == true) & (scores.ranking[:, 0] == predicted))
        surest = rows[np.argsort(-scores.probabilities[rows, predicted], kind="stable")]
        found.append(Confusion(true=true, predicted=predicted, rows=tuple(surest.tolist())))
    return found


def _links(links: Mapping[str, str]) -> str:
    items = [f'<li><a href="{html.escape(address)}">{html.escape(name)}</a></li>' for name, address in links.items()]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _confusions(report: RunReport) -> str:
    confusions = hardest_confusions(report.scores)
    if not confusions:
        return "<p>None: every test clip is right.</p>"
    return "".join(_confusion(report, confusion) for confusion in confusions)


def _confusion(report: RunReport, confusion: Confusion) -> str:
    true, predicted = report.actions[confusion.true], report.actions[confusion.predicted]
    num_clips = int(report.scores.confusion[confusion.true].sum())
    strips = "".join(
        f"<figure>{_strip(report.frames_of(report.scores.keys[row]), report.scores.keys[row])}"
        f"<figcaption>{html.escape(report.scores.keys[row])}: "
        f"{percent(float(report.scores.probabilities[row, confusion.predicted]))}</figcaption></figure>"
        for row in confusion.rows[:_CLIPS_OF_A_CONFUSION]
    )
    said = f"<b>{html.escape(true)}</b> taken for <b>{html.escape(predicted)}</b>"
    return f'<p>{said}: {len(confusion.rows)} of {num_clips} clips</p><div class="strips">{strips}</div>'


def _strip(frames_TCHW: UInt8[Tensor, "T 3 H W"], name: str) -> str:
    """First, middle and last frame beside each other."""
    places = np.linspace(0, len(frames_TCHW) - 1, _FRAMES_OF_A_STRIP).astype(int).tolist()
    every = max(1, frames_TCHW.shape[-1] // _PIXELS)
    frames = [frames_TCHW[place, :, ::every, ::every] for place in places]
    return image(encode_jpeg(torch.cat(frames, dim=2).contiguous(), quality=80), "jpeg", name)


def _actions(report: RunReport) -> str:
    """Every action in words, for those who look one up."""
    confusion_AA = report.scores.confusion
    rows: list[list[str]] = []
    for label, action in enumerate(report.actions):
        clips = int(confusion_AA[label].sum())
        wrong_A = confusion_AA[label].copy()
        wrong_A[label] = 0
        often = int(wrong_A.argmax())
        taken_for = f"{html.escape(report.actions[often])} ({wrong_A[often]})" if wrong_A[often] else ""
        right = percent(confusion_AA[label, label] / clips) if clips else ""
        rows.append([html.escape(action), str(clips), right, taken_for])
    shown = table(["action", "clips", "right", "most often taken for"], rows, {1, 2})
    return f"<details><summary>In numbers</summary>{shown}</details>"
