"""Scores of a model on a part of a split: everything is computed from each clip's probabilities, and only once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from tavlad.errors import UserError


class NotNumbers(UserError):
    """A model gave a clip no probabilities: it is not scored, and its accuracy would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model said of each clip. Rows are clips; A is the number of actions.

    Raises `NotNumbers`, naming a clip, where a probability is NaN or infinite.
    """

    keys: tuple[str, ...]
    labels: Int64[np.ndarray, " B"]
    probabilities: Float[np.ndarray, "B A"]

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.labels) == len(self.probabilities), "one row a clip"
        assert len(set(self.keys)) == len(self.keys), "a clip is scored once"
        if not self.keys:
            raise UserError("there are no clips to score: the test part of this split is empty")
        bad = np.flatnonzero(~np.isfinite(self.probabilities).all(axis=1))
        if len(bad):
            raise NotNumbers(
                f"the model's outputs are not numbers for {len(bad)} clips, the first is {self.keys[bad[0]]}"
            )

    @cached_property
    def ranking(self) -> NDArray[np.int64]:
        """Actions of each clip, most probable first, (B, A); ties go to the lower label."""
        return np.argsort(-self.probabilities, axis=1, kind="stable")

    def top(self, count: int) -> float:
        """Share of the clips, 0 to 1, whose action is among the `count` most probable ones."""
        return float((self.ranking[:, :count] == self.labels[:, None]).any(axis=1).mean())

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Clips by true action (row) and predicted action (column), (A, A)."""
        num_actions = self.probabilities.shape[1]
        counts = np.zeros((num_actions, num_actions), dtype=np.int64)
        np.add.at(counts, (self.labels, self.ranking[:, 0]), 1)
        return counts

    @property
    def mean_class(self) -> float:
        """Mean over the actions present of the share of their clips that are right, 0 to 1."""
        clips = self.confusion.sum(axis=1)
        present = clips > 0
        return float((self.confusion.diagonal()[present] / clips[present]).mean())

    def within(self, actions: tuple[int, ...]) -> float:
        """Share right among clips of `actions` when the model must choose among these alone."""
        rows = np.isin(self.labels, actions)
        if not rows.any():
            raise ValueError(f"no clip has any of the labels {actions}")
        choice = np.asarray(actions)[self.probabilities[rows][:, list(actions)].argmax(axis=1)]
        return float((choice == self.labels[rows]).mean())

    def summary(self, part: str) -> dict[str, float]:
        """The metrics of contract 5, such as "test/top1", from 0 to 1."""
        return {
            f"{part}/top1": self.top(1),
            f"{part}/top5": self.top(5),
            f"{part}/mean_class": self.mean_class,
        }


def fuse(scores: Sequence[Scores]) -> Scores:
    """Late fusion: the mean of several models' probabilities of the same clips, each with equal weight.

    ValueError where they have scored different clips.
    """
    first = scores[0]
    for other in scores[1:]:
        if other.keys != first.keys or not np.array_equal(other.labels, first.labels):
            raise UserError(
                "models that have scored different clips cannot be fused: pack their sets from the same videos with "
                "the same splits, and evaluate the same split of each"
            )
    probabilities = np.mean([each.probabilities for each in scores], axis=0)
    return Scores(keys=first.keys, labels=first.labels, probabilities=probabilities)
