"""Pictures of a training: confusion matrix, accuracy by action, curves, attention. Readable from 2 to 101 actions."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_BLUE = "#3b75af"
_DOTS_PER_INCH = 120
_FEW_ACTIONS = 20
"""Up to so many, a confusion matrix has room for numbers."""


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
    return buffer.getvalue()


def confusion_matrix(confusion_AA: Int64[np.ndarray, "A A"], actions: Sequence[str]) -> Figure:
    """Share of each true action's clips (row) by predicted action (column); counts in the cells when actions are few.

    Colours follow the square root of the share, 0 to 1, so that single confused clips stay visible.
    """
    num_actions = len(actions)
    shares = confusion_AA / np.maximum(1, confusion_AA.sum(axis=1, keepdims=True))
    is_small = num_actions <= _FEW_ACTIONS
    cell, font = (0.36, 9) if is_small else (0.17, 7)
    names = _label_inches(actions, font)
    side = max(1.8, cell * num_actions)
    figure = Figure(figsize=(side + names + 1.6, side + names + 0.9), layout="constrained")
    axes = figure.subplots()
    scale = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(shares, norm=scale, cmap="Blues")
    axes.set_xticks(range(num_actions), actions, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(range(num_actions), actions, fontsize=font, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if is_small:
        for row, column in np.argwhere(confusion_AA > 0):
            colour = "white" if scale(shares[row, column]) > 0.6 else "black"
            axes.text(column, row, str(confusion_AA[row, column]), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=min(0.85, 4 / side), aspect=12, label="share of the true action's clips")
    return figure


def _label_inches(labels: Sequence[str], font: int) -> float:
    """About how long the longest label is."""
    return 0.6 * font / 72 * max(map(len, labels))


def per_action_bars(confusion_AA: Int64[np.ndarray, "A A"], actions: Sequence[str]) -> Figure:
    """Share of each action's clips that are right, in percent, best first; the number of clips beside the name."""
    clips = confusion_AA.sum(axis=1)
    shares = 100 * confusion_AA.diagonal() / np.maximum(1, clips)
    order = np.argsort(shares, kind="stable")
    names = [f"{actions[label]} ({clips[label]})" for label in order]
    font = 9 if len(actions) <= _FEW_ACTIONS else 7
    size = (
        4 + _label_inches(names, font),
        0.9 + max(1.0, (0.24 if len(actions) <= _FEW_ACTIONS else 0.16) * len(actions)),
    )
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(actions)), shares[order], color=_BLUE)
    axes.set_yticks(range(len(actions)), names, fontsize=font, parse_math=False)
    axes.set(xlim=(0, 100), ylim=(-0.6, len(actions) - 0.4), xlabel="right, % (clips in brackets)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def training_curves(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the epochs of both stages, one after the other; a dotted line where stage 2 begins.

    A row has stage, epoch, train/loss, train/top1 and, where the epoch was tested, test/top1.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, [row.get("train/loss") for row in epochs], "train", _BLUE)
    left.set(ylabel="training loss", ylim=(0, None))
    for part, colour in (("train", _BLUE), ("test", "#d1603d")):
        shares = [row.get(f"{part}/top1") for row in epochs]
        _curve(right, [None if share is None else 100 * share for share in shares], part, colour)
    right.set(ylabel="top-1, %", ylim=(0, 102))
    right.legend(loc="lower right")
    num_stage_1 = sum(row["stage"] == 1 for row in epochs)
    for axes in (left, right):
        axes.set(xlabel="epoch (stage 2 from the dotted line)" if 0 < num_stage_1 < len(epochs) else "epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if 0 < num_stage_1 < len(epochs):
            axes.axvline(num_stage_1 + 0.5, color="grey", linestyle=":")
    return figure


def _curve(axes: Axes, values: Sequence[float | None], label: str, colour: str) -> None:
    """One metric over the epochs that have it, with a mark at each when they are few."""
    points = [(place, value) for place, value in enumerate(values, start=1) if value is not None]
    marker = "o" if len(points) < len(values) or len(points) <= 10 else None
    places, heights = [place for place, _ in points], [value for _, value in points]
    axes.plot(places, heights, marker=marker, markersize=4, label=label, color=colour)


def attention_grid(
    frames_FHWC: UInt8[np.ndarray, "F H W 3"],
    before_FHW: Float[np.ndarray, "F h w"],
    after_FHW: Float[np.ndarray, "F h w"],
    titles: Sequence[str] = (),
) -> Figure:
    """Frames, the attention of the untouched ImageNet trunk, and that after training, as the paper's Figure 3; viridis,
    fixed from 0 to 1, so that pictures can be compared."""
    num_frames = len(frames_FHWC)
    figure = Figure(figsize=(1.6 * num_frames + 1.2, 5), layout="constrained")
    axes_RF = figure.subplots(3, num_frames, squeeze=False)
    image = None
    for column in range(num_frames):
        axes_RF[0, column].imshow(frames_FHWC[column])
        if titles:
            axes_RF[0, column].set_title(titles[column], fontsize=8, parse_math=False)
        for row, maps in ((1, before_FHW), (2, after_FHW)):
            image = axes_RF[row, column].imshow(maps[column], vmin=0, vmax=1, cmap="viridis")
            axes_RF[row, column].set_xlabel(f"mean {maps[column].mean():.2f}", fontsize=8)
    for row, name in enumerate(("frame", "ImageNet", "trained")):
        axes_RF[row, 0].set_ylabel(name)
    for axes in axes_RF.flat:
        axes.set(xticks=[], yticks=[])
    assert image is not None, "there are frames"
    figure.colorbar(image, ax=axes_RF[1:, :], fraction=0.05, label="attention")
    return figure


def attention_overlay(
    frames_THWC: UInt8[np.ndarray, "T H W 3"], maps: Sequence[Float[np.ndarray, "T h w"]]
) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """Each frame, and beside it the frame under each attention map: half frame, half viridis from 0 to 1.

    A place of the map covers its own rectangle of the frame, without smoothing. Sides are cut to even numbers of
    pixels, as H.264 wants them.
    """
    height, width = (side - side % 2 for side in frames_THWC.shape[1:3])
    frames_THWC = frames_THWC[:, :height, :width]
    panels = [frames_THWC]
    for map_Thw in maps:
        rows = np.arange(height) * map_Thw.shape[1] // height
        columns = np.arange(width) * map_Thw.shape[2] // width
        colours = colormaps["viridis"](map_Thw[:, rows[:, None], columns].clip(0, 1))[..., :3] * 255
        panels.append(((frames_THWC + colours) / 2).round().astype(np.uint8))
    return np.concatenate(panels, axis=2)
