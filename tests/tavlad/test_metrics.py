"""Scores against counts made by hand."""

import numpy as np
import pytest

from tavlad.metrics import NotNumbers, Scores, fuse


def _scores() -> Scores:
    probabilities = np.array(
        [
            [0.7, 0.2, 0.1],  # right
            [0.5, 0.4, 0.1],  # of action 1, said 0
            [0.1, 0.8, 0.1],  # right
            [0.6, 0.1, 0.3],  # of action 2, said 0
        ]
    )
    return Scores(keys=("a", "b", "c", "d"), labels=np.array([0, 1, 1, 2]), probabilities=probabilities)


def test_top1_counts_clips_and_mean_class_counts_actions() -> None:
    scores = _scores()
    assert scores.top(1) == 2 / 4
    assert scores.mean_class == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_top_k_is_right_when_the_action_is_among_the_k_first() -> None:
    assert _scores().top(2) == 4 / 4


def test_confusion_has_the_truth_in_rows() -> None:
    assert _scores().confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_action_without_clips_does_not_count_in_the_mean() -> None:
    scores = Scores(keys=("a",), labels=np.array([1]), probabilities=np.array([[0.1, 0.8, 0.1]]))
    assert scores.mean_class == 1.0


def test_choice_within_a_pair_ignores_the_other_actions() -> None:
    # d says 0 before 2, so within (1, 2) it chooses 2; a is no clip of the pair.
    assert _scores().within((1, 2)) == 1.0
    assert _scores().within((0, 1)) == 2 / 3


def test_ties_go_to_the_lower_label_so_that_scores_are_reproducible() -> None:
    scores = Scores(keys=("a",), labels=np.array([0]), probabilities=np.array([[0.5, 0.5]]))
    assert scores.top(1) == 1.0


def test_no_clips_is_an_error_and_not_a_score() -> None:
    with pytest.raises(ValueError, match="no clips to score"):
        Scores(keys=(), labels=np.zeros(0, dtype=np.int64), probabilities=np.zeros((0, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_an_error_and_not_a_score(value: float) -> None:
    probabilities = np.array([[0.5, 0.5], [value, 0.5]])
    with pytest.raises(NotNumbers, match=r"not numbers for 1 clips, the first is b"):
        Scores(keys=("a", "b"), labels=np.array([0, 0]), probabilities=probabilities)


def test_fused_scores_are_the_mean_probabilities() -> None:
    one = _scores()
    other = Scores(keys=one.keys, labels=one.labels, probabilities=one.probabilities[:, [1, 0, 2]])
    fused = fuse([one, other])
    assert fused.probabilities[1].tolist() == pytest.approx([0.45, 0.45, 0.1])
    assert (fused.keys, fused.labels.tolist()) == (one.keys, one.labels.tolist())
    assert np.array_equal(fuse([one]).probabilities, one.probabilities)


def test_scores_of_different_clips_are_not_fused() -> None:
    one = _scores()
    other = Scores(keys=("a", "b", "c", "e"), labels=one.labels, probabilities=one.probabilities)
    with pytest.raises(ValueError, match="models that have scored different clips cannot be fused"):
        fuse([one, other])
