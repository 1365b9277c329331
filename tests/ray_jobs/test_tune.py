"""Which trials of a sweep are trained how far: by the sweep's own rules, with trainings that are only told of."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import TuneError

from infra.site import Site
from ray_jobs import tune
from ray_jobs.console import Console
from ray_jobs.plan import TrainingPlan
from ray_jobs.recipe import load_recipe
from ray_jobs.space import Changes, Choice
from ray_jobs.sweep import SCORE, SweepOptions, SweepPlan, SweepStore, Trial
from ray_jobs.sweep_progress import Progress
from ray_jobs.sweep_search import known_configurations
from ray_jobs.trial import TrialJob
from shards.store import open_store
from tavlad.errors import UserError

EPOCHS, RUNG = 10, 2
WIDTHS = tuple(range(1, 13))
"""The wider the GRU, the better is the trial."""


class _Records:
    """A sweep's runs in MLflow, which nobody looks at."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class _Killed(BaseException):
    """What happens to a sweep."""


class _Sweep:
    """A sweep of twelve trials; its trainings are rows told to its progress, in an order drawn anew each time."""

    def __init__(
        self,
        site: Site,
        monkeypatch: pytest.MonkeyPatch,
        search: Any = "grid",
        trials: int = len(WIDTHS),
        finalists: int = 1,
    ) -> None:
        recipe = load_recipe("demo", [f"stage1.epochs={EPOCHS}"], "set")
        names = {"dataset_uri": "set", "dataset_name": "set", "dataset_fingerprint": "f", "name": "t", "uri": "run"}
        self.plan = SweepPlan(
            training=TrainingPlan(site_name="local", recipe=recipe, split=1, **names),
            dimensions=(Choice(field="model.gru_width", values=WIDTHS),),
            options=SweepOptions(search=search, trials=None if search == "grid" else trials, finalists=finalists),
            weights="",
        )
        self.store = SweepStore(site, self.plan.name)
        self.trained: list[tuple[int, int]] = []
        """Width and epoch of every row, in their order."""
        self.failing: set[int] = set()
        self.diverging: set[int] = set()
        self.refused: set[int] = set()
        self.epochs_left = 9999
        """Before all is killed."""
        self.prepared = 0
        """How often codebooks and features were made."""
        self._site = site
        monkeypatch.setattr(tune, "_prepare", self._prepare)
        monkeypatch.setattr(tune, "_run", self._run)

    def go(self) -> dict[int, Trial]:
        known = known_configurations(self.plan)
        job: Any = TrialJob(sweep=self.plan, use_features=True)
        nothing: Any = None
        records: Any = _Records()
        search = tune._search  # pyright: ignore[reportPrivateUsage]
        trials = search(self._site, job, nothing, known, self.store, records, Console())
        return {trial.changes["model.gru_width"]: trial for trial in trials}

    def _prepare(self, *_: Any) -> None:
        self.prepared += 1

    def _run(
        self,
        site: Site,
        job: TrialJob,
        progress: Progress,
        console: Console,
        search: Any,
        num_samples: int = 1,
    ) -> None:
        if not isinstance(search, list):
            search = [{"model.gru_width": width} for width in WIDTHS[-num_samples:]]
        for changes in random.sample(search, len(search)):
            self._train(progress, changes, job.rung or EPOCHS)

    def _train(self, progress: Progress, changes: Changes, until: int) -> None:
        width = changes["model.gru_width"]
        progress.begin(changes)
        for epoch in range(1, until + 1):
            if not self.epochs_left:
                raise _Killed
            if width in self.failing:
                progress.fail(changes, TuneError("Traceback ...\nlost"))
                return
            if width in self.refused:
                progress.refuse(changes, "clip a is not what was packed")
                break
            if width in self.diverging and epoch == RUNG:
                progress.diverge(changes, "its loss is nan")
                break
            self.epochs_left -= 1
            self.trained.append((width, epoch))
            score = width / 100 if epoch <= RUNG else 1 - width / 100
            progress.add(changes, {"epoch": epoch, SCORE: score, "held_out/top1": score})
        progress.end(changes)


@pytest.fixture
def site(tmp_path: Path) -> Any:
    """All of a site that a sweep's memory asks for."""
    return SimpleNamespace(sweeps_uri=str(tmp_path), s3=None)


def _epochs(trials: dict[int, Trial]) -> dict[int, tuple[str, int]]:
    return {width: (trial.state, trial.epochs) for width, trial in sorted(trials.items())}


HALVED = {width: ("finished", EPOCHS) if width > 9 else ("stopped", RUNG) for width in WIDTHS}


def test_best_quarter_at_the_rung_is_trained_to_its_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = _Sweep(site, monkeypatch)
    assert _epochs(sweep.go()) == HALVED
    assert sum(epochs for _, epochs in HALVED.values()) <= 0.45 * EPOCHS * len(WIDTHS)
    order = [epoch for _, epoch in sweep.trained]
    assert max(order[: RUNG * len(WIDTHS)]) == RUNG, "nobody goes on before all are there"


def test_sweep_whose_trials_all_fail_ends_as_the_first_one_did(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = _Sweep(site, monkeypatch)
    sweep.refused = set(WIDTHS)
    with pytest.raises(UserError, match="every trial failed, the first one with: clip a is not what was packed"):
        sweep.go()
    sweep.refused, sweep.failing = set(), set(WIDTHS)
    with pytest.raises(RuntimeError, match=r"every trial failed, the first one with: Traceback .*\nlost"):
        sweep.go()
    sweep.failing = set()
    assert _epochs(sweep.go()) == HALVED, "none of them was over"


@pytest.mark.parametrize("killed_after", [5, 23, 24, 31, 52])
def test_interrupted_sweep_decides_as_an_undisturbed_one(
    site: Site, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    sweep = _Sweep(site, monkeypatch)
    sweep.epochs_left = killed_after
    with pytest.raises(_Killed):
        sweep.go()
    at_rung = len(sweep.store.waiting())
    assert at_rung == min(killed_after // RUNG, len(WIDTHS))
    sweep.epochs_left, sweep.trained = 9999, []
    assert _epochs(sweep.go()) == HALVED
    again = {width for width, _ in sweep.trained}
    assert len(again) <= 12 - at_rung + 3, "who waited already is not trained to the rung again"


def test_sweep_that_is_done_is_told_not_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    _Sweep(site, monkeypatch).go()
    again = _Sweep(site, monkeypatch)
    assert _epochs(again.go()) == HALVED
    assert (again.trained, again.prepared) == ([], 0)


@pytest.mark.parametrize("before", [1, 3, 4, 5, 8, 11])
def test_sweep_of_more_trials_ends_as_if_all_had_been_asked_for_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: int
) -> None:
    small = _Sweep(site, monkeypatch, "random", before)
    first = small.go()
    assert len(first) == before
    large = _Sweep(site, monkeypatch, "random")
    assert large.plan.name == small.plan.name
    trials = _epochs(large.go())
    assert trials == HALVED
    over = {width for width, trial in first.items() if trial.state == "finished"} - {10, 11, 12}
    assert (f"  {len(over)} trials count as they stood at epoch {RUNG}" in capsys.readouterr().out) == bool(over)
    to_rung = {width for width, epoch in large.trained if epoch == 1} - {10, 11, 12}
    assert to_rung == set(WIDTHS) - set(first) - {10, 11, 12}, "who waits at the rung is not trained to it again"
    fewer = _Sweep(site, monkeypatch, "random", before)
    assert _epochs(fewer.go()) == _epochs(first)
    assert fewer.trained == []


def test_more_finalists_are_trained_to_their_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    _Sweep(site, monkeypatch, finalists=2).go()
    trials = _Sweep(site, monkeypatch, finalists=5).go()
    assert [width for width, trial in trials.items() if trial.state == "finished"] == [8, 9, 10, 11, 12]


def test_sweep_goes_on_with_what_earlier_versions_wrote_of_stopped_trials(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They recorded a stopped trial as one that is over, and removed its checkpoints."""
    small = _Sweep(site, monkeypatch, "random", 8)
    stopped = [trial for trial in small.go().values() if trial.state == "stopped"]
    for trial in stopped:
        content = json.dumps(dataclasses.asdict(trial), indent=1).encode()
        open_store(small.store.uri).write_if_absent(f"trials/{trial.id}.json", content)
    for _ in range(2):
        large = _Sweep(site, monkeypatch, "random")
        assert _epochs(large.go()) == HALVED
    assert large.trained == [], "the second time"
    assert {trial.changes["model.gru_width"] for trial in large.store.finished().values()} >= {10, 11, 12}


def test_sweep_removes_what_a_killed_driver_left_of_checkpoints(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = _Sweep(site, monkeypatch)
    sweep.failing = {3}
    sweep.go()
    one, other = (sweep.plan.trial_id({"model.gru_width": width}) for width in (12, 3))
    for trial_id in (one, other):
        open_store(f"{sweep.store.uri}/checkpoints/{trial_id}").write_if_absent("stage1-epoch00004/w/trial.pt", b"half")
    sweep.go()
    left = {path.parents[2].name for path in tmp_path.rglob("trial.pt")}
    assert left == {other}, "a trial that is not over keeps its checkpoints"


def test_trial_that_fails_keeps_nobody_waiting_and_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = _Sweep(site, monkeypatch)
    sweep.failing = {2, 12}
    first = sweep.go()
    assert set(first) == set(WIDTHS) - {2, 12}
    assert [width for width, trial in first.items() if trial.state == "finished"] == [9, 10, 11]
    sweep.failing = set()
    assert _epochs(sweep.go()) == HALVED, "as if none had failed"


def test_trial_that_fails_after_the_rung_leaves_the_decision(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = _Sweep(site, monkeypatch)
    sweep.epochs_left = RUNG * len(WIDTHS)
    with pytest.raises(_Killed):
        sweep.go()
    sweep.epochs_left, sweep.failing = 9999, {11}
    assert set(sweep.go()) == set(WIDTHS) - {11}
    sweep.failing = set()
    assert _epochs(sweep.go()) == HALVED


def test_a_sweep_says_how_far_each_trial_came(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = _Sweep(site, monkeypatch)
    sweep.diverging = {4}
    assert _epochs(sweep.go())[4] == ("diverged", RUNG - 1)
    said = capsys.readouterr().out
    assert f"epoch {RUNG}: 3 of 11 trials go on" in said
    assert f"diverged in epoch {RUNG}, its loss is nan: gru_width 4" in said
    assert f"stopped after epoch {RUNG}, held-out 9.0%: gru_width 9" in said
    assert f"finished after epoch {EPOCHS}, held-out 90.0%: gru_width 10" in said


def test_search_that_proposes_goes_to_the_rung_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    assert _epochs(_Sweep(site, monkeypatch, "optuna").go()) == HALVED
