"""Pictures of a training: confusion matrix, each action's accuracy, curves, attention. Readable from 2 to 101 actions."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure

_DOTS_PER_INCH = 120


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
    return buffer.getvalue()


def confusion_matrix(confusion_AA: Int64[np.ndarray, "A A"], actions: Sequence[str]) -> Figure:
    """Share of each true action's clips (row) by predicted action (column), 0 to 1; counts in the cells when few."""
    num_actions = len(actions)
    shares = confusion_AA / np.maximum(1, confusion_AA.sum(axis=1, keepdims=True))
    side = max(4.5, 0.22 * num_actions + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    font = 9 if num_actions <= 20 else 6
    axes.set_xticks(range(num_actions), actions, rotation=90, fontsize=font)
    axes.set_yticks(range(num_actions), actions, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion, share of each true action")
    if num_actions <= 20:
        for row, column in np.argwhere(confusion_AA > 0):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(confusion_AA[row, column]), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, fraction=0.04)
    return figure


def per_action_bars(confusion_AA: Int64[np.ndarray, "A A"], actions: Sequence[str]) -> Figure:
    """Share of each action's clips that are right, in percent, best first; the number of clips beside the name."""
    clips = confusion_AA.sum(axis=1)
    shares = 100 * confusion_AA.diagonal() / np.maximum(1, clips)
    order = np.argsort(shares, kind="stable")
    figure = Figure(figsize=(7, max(2.5, 0.19 * len(actions) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(actions)), shares[order], color="#3b75af")
    names = [f"{actions[label]} ({clips[label]})" for label in order]
    axes.set_yticks(range(len(actions)), names, fontsize=9 if len(actions) <= 30 else 7)
    axes.set(xlim=(0, 100), ylim=(-0.6, len(actions) - 0.4), xlabel="right, % (clips in brackets)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def training_curves(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the epochs of both stages, one after the other; a dotted line where stage 2 begins."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = list(range(1, len(epochs) + 1))
    left.plot(place, [row["train/loss"] for row in epochs], color="#3b75af")
    left.set(xlabel="epoch (both stages)", ylabel="training loss", ylim=(0, None))
    right.plot(place, [100 * row["train/top1"] for row in epochs], label="train", color="#3b75af")
    tested = [(at, 100 * row["test/top1"]) for at, row in zip(place, epochs, strict=True) if "test/top1" in row]
    right.plot(*zip(*tested, strict=True), marker="o", markersize=4, label="test", color="#d1603d")
    right.set(xlabel="epoch (both stages)", ylabel="top-1, %", ylim=(0, 102))
    right.legend(loc="lower right")
    first_of_stage_2 = sum(row["stage"] == 1 for row in epochs)
    if 0 < first_of_stage_2 < len(epochs):
        for axes in (left, right):
            axes.axvline(first_of_stage_2 + 0.5, color="grey", linestyle=":")
    return figure


def attention_grid(
    frames_FHWC: UInt8[np.ndarray, "F H W 3"],
    before_FHW: Float[np.ndarray, "F h w"],
    after_FHW: Float[np.ndarray, "F h w"],
) -> Figure:
    """Frames, the attention of the untouched ImageNet trunk, and that after training; scale fixed from 0 to 1."""
    num_frames = len(frames_FHWC)
    figure = Figure(figsize=(1.6 * num_frames + 1.2, 5), layout="constrained")
    axes_RF = figure.subplots(3, num_frames, squeeze=False)
    image = None
    for column in range(num_frames):
        axes_RF[0, column].imshow(frames_FHWC[column])
        for row, maps in ((1, before_FHW), (2, after_FHW)):
            image = axes_RF[row, column].imshow(maps[column], vmin=0, vmax=1, cmap="viridis")
    for row, name in enumerate(("frame", "ImageNet", "trained")):
        axes_RF[row, 0].set_ylabel(name)
    for axes in axes_RF.flat:
        axes.set(xticks=[], yticks=[])
    assert image is not None, "there are frames"
    figure.colorbar(image, ax=axes_RF[1:, :], fraction=0.05, label="attention")
    return figure
