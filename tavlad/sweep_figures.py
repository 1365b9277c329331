"""Pictures of a sweep: every trial as a line through its settings, and how much each setting mattered."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import permutation_importance

_BLUE = "#3b75af"
_FEWEST_TRIALS = 4  # below that, what mattered cannot be told
_WIDE = 4.0  # from the smallest value to the largest: such an axis is logarithmic
_FEW = 6  # distinct values that each get a tick, and whose lines are spread about it
_SPREAD = 0.05


def parallel_coordinates(
    settings: Mapping[str, Sequence[Any]], accuracy: Sequence[float], is_whole: Sequence[bool]
) -> Figure:
    """A line a trial: an axis a setting, and the held-out accuracy (0 to 1) at the right, which is the colour too.

    Dashed lines are trials that were stopped early. An axis is logarithmic where its largest value is four times its
    smallest or more. Lines that share one of few values are spread about it, the better ones above.
    """
    names = [*settings, "held-out, %"]
    axes_values = [_positions(values) for values in settings.values()]
    percent = 100 * np.asarray(accuracy)
    axes_values.append(_positions(percent.tolist(), may_be_log=False))
    figure = Figure(figsize=(1.6 + 1.7 * len(names), 4.2), layout="constrained")
    axes = figure.subplots()
    low, high = float(percent.min()), float(percent.max())
    order = np.argsort(percent, kind="stable")
    for trial in order:  # the best are drawn last, on top
        shade = (percent[trial] - low) / (high - low) if high > low else 1.0
        spread = [_SPREAD * (shade - 0.5) * (len(set(positions)) <= _FEW) for positions, _ in axes_values[:-1]]
        axes.plot(
            range(len(names)),
            [positions[trial] + more for (positions, _), more in zip(axes_values, [*spread, 0.0], strict=True)],
            color=colormaps["viridis"](shade),
            linestyle="-" if is_whole[trial] else "--",
            linewidth=2.2 if trial == order[-1] else 1.2,
            alpha=0.9,
        )
    for place, (_, ticks) in enumerate(axes_values):
        axes.axvline(place, color="0.6", linewidth=0.8, zorder=0)
        for position, label in ticks:
            axes.annotate(
                label,
                (place, position),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                color="0.1",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            )
    axes.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names], parse_math=False)
    axes.set(yticks=[], xlim=(-0.2, len(names) - 0.5), title="trials (dashed: stopped early)")
    axes.spines[["left", "right", "top", "bottom"]].set_visible(False)
    return figure


def importance(settings: Mapping[str, Sequence[Any]], scores: Sequence[float]) -> dict[str, float] | None:
    """How much worse a random forest guesses the scores when one setting is shuffled, as shares that sum to 1.

    Largest first; None where there are too few trials or none of the settings tells anything.
    """
    varied = {name: _numbers(values) for name, values in settings.items() if len(set(map(repr, values))) > 1}
    if len(scores) < _FEWEST_TRIALS or not varied:
        return None
    inputs = np.stack(list(varied.values()), axis=1)
    forest = RandomForestRegressor(n_estimators=100, random_state=0).fit(inputs, scores)
    found = permutation_importance(forest, inputs, scores, n_repeats=10, random_state=0)
    means = np.maximum(np.asarray(found["importances_mean"]), 0.0)
    if means.sum() <= 0:
        return None
    shares = dict(zip(varied, (means / means.sum()).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def importance_bars(shares: Mapping[str, float]) -> Figure:
    """What `importance` found, the largest on top."""
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [100 * shares[name] for name in names], color=_BLUE)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlim=(0, 100), xlabel="importance, % (permutation in a random forest)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _positions(values: Sequence[Any], *, may_be_log: bool = True) -> tuple[list[float], list[tuple[float, str]]]:
    """From 0 to 1 along an axis, and its ticks."""
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        names = sorted(set(map(str, values)))
        place = {name: index / max(1, len(names) - 1) for index, name in enumerate(names)}
        return [place[str(value)] for value in values], [(place[name], name) for name in names]
    numbers = np.asarray(values, dtype=float)
    low, high = numbers.min(), numbers.max()
    if high == low:
        return [0.5] * len(numbers), [(0.5, f"{low:.3g}")]
    is_log = may_be_log and low > 0 and high / low >= _WIDE
    scaled = np.log(numbers) if is_log else numbers
    places = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    distinct = sorted(set(zip(places.tolist(), numbers.tolist(), strict=True)))
    few = distinct if len(distinct) <= _FEW else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
    return places.tolist(), [(place, f"{number:.3g}") for place, number in few]


def _numbers(values: Sequence[Any]) -> Float[np.ndarray, " trials"]:
    """Values as a forest takes them: their rank, which is a matter neither of scale nor of type."""
    try:
        distinct = sorted(set(values))
    except TypeError:
        distinct = sorted(set(values), key=repr)
    rank = {repr(value): place for place, value in enumerate(distinct)}
    return np.array([rank[repr(value)] for value in values], dtype=float)
