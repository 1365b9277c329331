"""Pictures show every action, and no name is cut off, with two actions and with a hundred and one."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from tavlad import figures

LONG = "a long action name, of_many $words_$ & <signs>"  # no formula, though it looks like one


def names(num_actions: int) -> list[str]:
    return [f"action {label}" for label in range(num_actions - 1)] + [LONG]


def confusion(num_actions: int, clips: int = 10) -> np.ndarray:
    """Every action is right for 80 % of its clips; the others go to the next action."""
    eye = np.eye(num_actions, dtype=np.int64)
    return (eye * 8 + np.roll(eye, 1, axis=1) * 2) * (clips // 10)


def drawn_labels(figure: Figure, axis: str) -> list[Text]:
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    return axes.get_xticklabels() if axis == "x" else axes.get_yticklabels()


def assert_apart(labels: list[Text], figure: Figure, along: str) -> None:
    """No two neighbours overlap in the direction the axis runs."""
    FigureCanvasAgg(figure).draw()
    boxes = sorted(
        (getattr(box, f"{along}0"), getattr(box, f"{along}1")) for box in map(Text.get_window_extent, labels)
    )
    assert all(first[1] <= second[0] + 0.5 for first, second in itertools.pairwise(boxes))


@pytest.mark.parametrize("num_actions", [2, 10, 101])
def test_confusion_matrix_names_every_action_inside_the_picture(num_actions: int) -> None:
    actions = names(num_actions)
    figure = figures.confusion_matrix(confusion(num_actions), actions)
    for axis, along in (("x", "x"), ("y", "y")):
        labels = drawn_labels(figure, axis)
        assert [label.get_text() for label in labels] == actions
        assert_apart(labels, figure, along)
        for label in labels:
            box = label.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("num_actions", [2, 10, 101])
def test_bars_name_every_action_best_first_with_its_clips(num_actions: int) -> None:
    counts = confusion(num_actions)
    counts[0] = 0
    counts[0, 0] = 5
    figure = figures.per_action_bars(counts, names(num_actions))
    labels = drawn_labels(figure, "y")
    assert labels[-1].get_text() == "action 0 (5)"
    assert {label.get_text() for label in labels} == {
        "action 0 (5)",
        *(f"{name} (10)" for name in names(num_actions)[1:]),
    }
    assert_apart(labels, figure, "y")
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths[-1] == 100
    assert widths[:-1] == [80] * (num_actions - 1)


def test_confusion_cells_are_shares_of_the_true_action_with_counts() -> None:
    figure = figures.confusion_matrix(np.array([[30, 10], [0, 2]]), ["a", "b"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert sorted(text.get_text() for text in axes.texts) == ["10", "2", "30"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")


def test_action_without_clips_is_an_empty_row_and_not_an_error() -> None:
    counts = np.array([[0, 0], [1, 3]])
    assert figures.confusion_matrix(counts, ["a", "b"]).axes[0].images[0].get_array()[0].tolist() == [0, 0]
    assert [bar.get_width() for bar in figures.per_action_bars(counts, ["a", "b"]).axes[0].patches] == [0, 75]


def row(stage: int, **metrics: float) -> dict[str, float]:
    return {"stage": stage, "epoch": 1, **{name.replace("_", "/"): value for name, value in metrics.items()}}


def test_curves_skip_epochs_without_a_test_and_mark_the_second_stage() -> None:
    rows = [
        row(1, train_loss=2.0, train_top1=0.2),
        row(1, train_loss=1.0, train_top1=0.5, test_top1=0.4),
        row(2, train_loss=0.5, train_top1=0.9, test_top1=0.7),
    ]
    loss, accuracy = figures.training_curves(rows).axes
    assert [line.get_ydata().tolist() for line in accuracy.lines[:2]] == [[20, 50, 90], [40, 70]]
    assert accuracy.lines[1].get_xdata().tolist() == [2, 3]
    assert loss.lines[0].get_ydata().tolist() == [2, 1, 0.5]
    assert loss.lines[1].get_xdata() == [2.5, 2.5]


def test_curve_of_a_single_epoch_can_be_seen() -> None:
    figure = figures.training_curves([row(1, train_loss=2.0, train_top1=0.2)])
    assert all(len(axes.lines[0].get_xdata()) == 1 and axes.lines[0].get_marker() == "o" for axes in figure.axes)
    assert all(len(axes.lines) <= 2 for axes in figure.axes), "no second stage, no dotted line"


def test_attention_has_one_scale_for_all_maps_and_says_its_mean() -> None:
    frames = np.zeros((3, 20, 20, 3), np.uint8)
    before, after = np.full((3, 4, 4), 0.9, np.float32), np.full((3, 4, 4), 0.25, np.float32)
    figure = figures.attention_grid(frames, before, after)
    maps = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (4, 4)]
    assert len(maps) == 6
    assert {axes.images[0].get_clim() for axes in maps} == {(0, 1)}
    assert [axes.get_xlabel() for axes in maps] == ["mean 0.90"] * 3 + ["mean 0.25"] * 3


def test_png_is_a_picture_and_leaves_no_open_figures() -> None:
    picture = imread(io.BytesIO(figures.png(figures.per_action_bars(confusion(3), names(3)))))
    assert picture.ndim == 3
    assert min(picture.shape[:2]) > 100
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
