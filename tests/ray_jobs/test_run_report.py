"""The page of one training: hardest confusions first, legible for 101 actions, nothing outside the file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_jobs.run_report import RunReport, hardest_confusions, write_run_report
from tavlad.metrics import Scores
from tests.ray_jobs.test_report import Page


def scores_of(labels: list[int], predicted: list[int], num_actions: int, sure: list[float] | None = None) -> Scores:
    probabilities = np.full((len(labels), num_actions), 0.1 / num_actions)
    for row, (action, share) in enumerate(zip(predicted, sure or [0.9] * len(labels), strict=True)):
        probabilities[row, action] = share
    keys = tuple(f"clip{row:04d}" for row in range(len(labels)))
    return Scores(keys=keys, labels=np.array(labels), probabilities=probabilities)


def report_of(scores: Scores, actions: tuple[str, ...]) -> RunReport:
    picture = torch.arange(64 * 64, dtype=torch.uint8).reshape(1, 1, 64, 64).expand(5, 3, 64, 64)
    history = [
        {"stage": stage, "epoch": epoch, "train/loss": 1 / epoch, "train/top1": 0.5, "test/top1": 0.5}
        for stage in (1, 2)
        for epoch in (1, 2, 3)
    ]
    return RunReport(
        name="x-split1-<ta-vlad>",
        facts={"test top-1": "50.0%"},
        actions=actions,
        history=history,
        scores=scores,
        recipe={"stage1.lr": 0.01, "model.trunk": "resnet34"},
        links={"compare": "http://127.0.0.1:5000/#/experiments/1/runs?a=b&c=d"},
        frames_of=lambda _: picture,
    )


def test_hardest_confusions_have_the_most_clips_and_the_surest_mistake_first() -> None:
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    scores = scores_of(labels, [1, 1, 0, 2, 0, 1, 2, 2, 2], 3, [0.5, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    found = [(each.true, each.predicted, each.rows) for each in hardest_confusions(scores)]
    assert found == [(0, 1, (1, 0)), (1, 0, (4,)), (0, 2, (3,))]
    assert hardest_confusions(scores, most=1)[0].rows == (1, 0)


@pytest.mark.parametrize("num_actions", [2, 101])
def test_page_names_every_action_and_needs_nothing_else(num_actions: int, tmp_path: Path) -> None:
    actions = tuple(f"action number {number} & more" for number in range(num_actions))
    random = np.random.default_rng(0)
    labels = random.integers(0, num_actions, 300)
    predicted = np.where(random.random(300) < 0.7, labels, random.integers(0, num_actions, 300))
    path = tmp_path / "report.html"
    write_run_report(path, report_of(scores_of(labels.tolist(), predicted.tolist(), num_actions), actions))
    page = Page(path.read_text(encoding="utf-8"))
    assert all(action in page.text for action in actions)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "x-split1-<ta-vlad>" in page.text
    assert page.links == ["http://127.0.0.1:5000/#/experiments/1/runs?a=b&c=d"]
    assert len(page.sources) >= 3 + min(2, num_actions)


def test_page_of_a_training_without_a_mistake_says_so(tmp_path: Path) -> None:
    write_run_report(tmp_path / "report.html", report_of(scores_of([0, 1], [0, 1], 2), ("a", "b")))
    assert "every test clip is right" in (tmp_path / "report.html").read_text()
