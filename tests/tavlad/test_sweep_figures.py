"""What mattered in a sweep is what decided its scores."""

import itertools

import numpy as np

from tavlad.figures import png
from tavlad.sweep_figures import importance, importance_bars, parallel_coordinates


def _grid() -> dict[str, list[object]]:
    combinations = list(itertools.product([1e-4, 1e-3, 1e-2], [16, 64], ["cam", "none"]))
    names = ("stage1.lr", "model.num_clusters", "model.attention")
    return {name: [each[place] for each in combinations] for place, name in enumerate(names)}


def test_setting_that_decides_the_score_has_the_importance() -> None:
    settings = _grid()
    scores = [0.9 if lr == 1e-3 else 0.2 for lr in settings["stage1.lr"]]
    shares = importance(settings, scores)
    assert shares is not None
    assert next(iter(shares)) == "stage1.lr"
    assert shares["stage1.lr"] > 0.9
    assert abs(sum(shares.values()) - 1) < 1e-9
    by_name = importance(settings, [0.9 if name == "cam" else 0.2 for name in settings["model.attention"]])
    assert by_name is not None
    assert next(iter(by_name)) == "model.attention"


def test_nothing_is_said_of_too_few_trials_or_equal_ones() -> None:
    assert importance({"lr": [1, 2, 3]}, [0.1, 0.2, 0.3]) is None
    assert importance({"lr": [1, 1, 1, 1]}, [0.1, 0.2, 0.3, 0.4]) is None
    assert importance({"lr": [1, 2, 3, 4]}, [0.5] * 4) is None


def test_pictures_are_drawn_of_names_numbers_and_single_values() -> None:
    settings = _grid() | {"model.dropout": [0.5] * 12}
    accuracy = [number / 12 for number in range(12)]
    figure = parallel_coordinates(settings, accuracy, [number % 2 == 0 for number in range(12)])
    assert png(figure).startswith(b"\x89PNG")
    (axes,) = figure.axes
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines if len(line.get_xdata()) == 5]
    assert len(lines) == 12, "a line a trial"
    assert len({tuple(line[:4]) for line in lines}) == 12, "those of the same settings but one lie beside each other"
    lr_of = sorted({round(line[0], 1) for line in lines})
    assert lr_of == [0.0, 0.5, 1.0], "1e-4, 1e-3 and 1e-2 are evenly apart"
    ends = sorted(line[-1] for line in lines)
    assert np.allclose(ends, np.linspace(0, 1, 12)), "accuracies are on a linear scale, however wide"
    assert png(importance_bars({"stage1.lr": 0.75, "model.num_clusters": 0.25})).startswith(b"\x89PNG")
