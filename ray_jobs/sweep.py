"""What a sweep and its trials are, and what is known of them. The sweep's memory is here, not Ray Tune's:

started/ID.json      the fields a trial changes, written before it begins
checkpoints/ID/...   a trial's state after each epoch, until it came to its end
waiting/ID.json      a trial as it stood at the rung, where it waits for the others
trials/ID.json       a trial that came to its end or diverged, written once: its rows, epoch by epoch
code.json            the code that made them

A trial's ID is a fingerprint of what it computes. A sweep started again takes what is over from here. Which trials go
on from the rung is not kept but decided anew: where more trials are asked for, others may be among the best quarter.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from infra.site import Site
from ray_jobs.checkpoints import Checkpoints
from ray_jobs.plan import CODES, TrainingPlan
from ray_jobs.provenance import Codes, OtherCode, codes_of, first_that_exists, name_in_use, recorded
from ray_jobs.recipe import Recipe, change_recipe
from ray_jobs.space import Changes, Dimension, changed, extremes
from shards.held_out import held_out
from shards.index import Index
from shards.store import Store, open_store
from tavlad.config import STAGE2, StageConfig
from tavlad.errors import UserError
from tavlad.metrics import Scores

Search = Literal["random", "grid", "optuna"]
Scheduler = Literal["halving", "none"]
State = Literal["finished", "stopped", "diverged", "waiting"]
Row = dict[str, Any]
"""One epoch of a trial: `epoch` from 1, and its metrics."""

_FORMAT = 1  # raise it when the same trial would no longer compute the same
SCORE = "held_out/score"

RUNG, KEPT = 5, 4
"""After a fifth of the epochs a trial waits for the others, and the best quarter goes on: 2/5 of all epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """How a sweep searches."""

    search: Search = "random"
    """A seeded random draw, every combination, or Optuna's TPE."""
    scheduler: Scheduler = "halving"
    """Whether trials that fall behind are stopped early, all at once and so in whatever order they ran."""
    trials: int | None = None
    """How many; None for all of a grid."""
    share: float = 0.25
    """Part of the training clips that settings are chosen by."""
    finalists: int = 1
    """How many of the best configurations are then trained in both stages on the whole training part."""
    at_once: int | None = None
    """Trials at the same time, at most; None: as the cluster has room."""
    workers_per_trial: int = 1
    """Ranks that share a trial's batches. One needs no process group and begins some 20 s sooner. Like `at_once` it is
    no part of what a sweep is."""

    def __post_init__(self) -> None:
        if self.search == "grid" and self.trials is not None:
            raise UserError("a grid has as many trials as combinations: leave --trials out, or search random or optuna")
        if self.search != "grid" and self.trials is None:
            raise UserError(f"--search {self.search} needs --trials N")
        if self.trials is not None and self.trials < 1:
            raise UserError(f"--trials {self.trials}: must be at least 1")
        if self.finalists < 0:
            raise UserError(f"--finalists {self.finalists}: must not be negative")
        if self.at_once is not None and self.at_once < 1:
            raise UserError(f"--at-once {self.at_once}: must be at least 1")
        if self.workers_per_trial < 1:
            raise UserError(f"--workers-per-trial {self.workers_per_trial}: must be at least 1")
        if not 0 < self.share < 1:
            raise UserError(f"--held-out {self.share}: must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """One sweep. The same recipe, space, set, split and way of searching give the same name: that is how it goes on."""

    training: TrainingPlan
    """What is trained at the end, before any field is changed."""
    dimensions: tuple[Dimension, ...]
    options: SweepOptions
    weights: str
    """What the trunk's weights are: a file that changed under its name makes another sweep."""
    is_first_name: bool = False
    """Whether its name and its trials' are of the first kind, which held every field."""
    again: str = ""
    """Such as ".2", of a sweep begun anew: what its name has more."""

    @cached_property
    def name(self) -> str:
        """Such as "demo-split1-sweep-1a2b3c4d5e"; more trials or finalists are more of the same sweep."""
        facts = {
            "trial": self._fingerprint({}),
            "set": self.training.dataset_fingerprint,
            "split": self.training.split,
            "weights": self.weights,
            "space": [repr(each) for each in self.dimensions],
            "search": self.options.search,
            "scheduler": self.options.scheduler,
            "share": self.options.share,
            "format": _FORMAT,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{self.training.dataset_name}-split{self.training.split}-sweep-{digest[:10]}{self.again}"

    @property
    def rung(self) -> int | None:
        """Epochs after which a trial waits for the others; None where none is stopped early."""
        epochs = int(extremes(self.dimensions).get("stage1.epochs", self.training.recipe.stage1.epochs))
        rung = max(1, epochs // RUNG)
        return rung if self.options.scheduler == "halving" and rung < epochs else None

    @property
    def seed(self) -> int:
        """Of the draw, of the order of trials and of what is held out."""
        return self.training.recipe.training.seed

    def recipe(self, changes: Changes) -> Recipe:
        """The recipe of a finalist. ValueError for a combination that cannot be."""
        return changed(self.training.recipe, changes)

    def trial_recipe(self, changes: Changes) -> Recipe:
        """The recipe of a trial: stage 1 alone, scored after every epoch."""
        recipe = change_recipe(self.recipe(changes), {"training": {"evaluate_every": 1}})
        return dataclasses.replace(recipe, stage2=StageConfig(epochs=0, lr=STAGE2.lr))

    def trial_id(self, changes: Changes) -> str:
        """The fingerprint of what a trial computes."""
        return self._fingerprint(changes, sweep=self.name)[:16]

    def _fingerprint(self, changes: Changes, **facts: str | int) -> str:
        recipe = self.trial_recipe(changes)
        first = recipe.first_fingerprint(**facts) if self.is_first_name else None
        return first or recipe.fingerprint(**facts)

    def held_out(self, index: Index) -> Index:
        """The set as trials see it."""
        return held_out(index, self.training.split, self.options.share, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial that is over, or waits for the others."""

    id: str
    changes: Changes
    state: State
    rows: list[Row] = field(default_factory=list)
    """One an epoch, in order."""
    reason: str = ""
    """Why it diverged."""

    @property
    def epochs(self) -> int:
        """Epochs it was trained."""
        return len(self.rows)

    @property
    def score(self) -> float:
        """What it is chosen by: `selection_score` after its last epoch; below every other where it diverged."""
        return float(self.rows[-1][SCORE]) if self.rows and self.state != "diverged" else -1.0

    def score_at(self, rung: int) -> float:
        """As it stood after so many epochs, or at its end where that came before."""
        return float(self.rows[rung - 1][SCORE]) if self.epochs >= rung else self.score


def selection_score(scores: Scores) -> float:
    """Right clips, and between equals the lower mean cross entropy, as one number from 0 to 1.

    (right + 1 / (1 + loss)) / (clips + 1): one more right clip always outweighs any loss. Held-out parts are small, so
    accuracies alone are mostly ties.
    """
    chosen = scores.probabilities[np.arange(len(scores.labels)), scores.labels]
    right = int((scores.ranking[:, 0] == scores.labels).sum())
    return (right + 1 / (1 + held_out_loss(scores, chosen))) / (len(scores.labels) + 1)


def held_out_loss(scores: Scores, chosen: "np.ndarray[Any, Any] | None" = None) -> float:
    """Mean cross entropy of the clips; probabilities are taken as at least 1e-12."""
    if chosen is None:
        chosen = scores.probabilities[np.arange(len(scores.labels)), scores.labels]
    return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first: trials that were trained to their end before those stopped early, then by score, then by ID."""
    whole = {"finished": 0, "stopped": 1, "diverged": 2}
    return sorted(trials, key=lambda trial: (whole[trial.state], -trial.score, trial.id))


def going_on(plan: SweepPlan, trials: Sequence[Trial], total: int) -> set[str]:
    """Trials of the best quarter at the rung, by ID; at least as many as there are finalists.

    A function of the rows alone: an interrupted sweep decides the same again. A trial that failed is not among
    `trials`, but of the `total`: it keeps nobody waiting, and no other trial goes on in its place.
    """
    rung, count = plan.rung, max(math.ceil(total / KEPT), plan.options.finalists)
    assert rung is not None
    best = sorted(trials, key=lambda trial: (-trial.score_at(rung), trial.id))
    return {trial.id for trial in best[:count]}


def settled(plan: SweepPlan, trial: Trial, ids: set[str]) -> Trial:
    """A trial as it ends where `ids` go on from the rung: if it is none of these, as it stood there. It may be further,
    if fewer trials were asked for before or some had failed."""
    rung = plan.rung
    assert rung is not None
    is_past = trial.state == "waiting" or trial.epochs > rung or (trial.state == "diverged" and trial.epochs == rung)
    if trial.id in ids or not is_past:
        return trial
    return dataclasses.replace(trial, state="stopped", rows=trial.rows[:rung], reason="")


class SweepStore:
    """What is known of a sweep's trials, on the site's store."""

    def __init__(self, site: Site, name: str) -> None:
        self.uri = f"{site.sweeps_uri}/{name}"
        self._site = site
        self._store: Store = open_store(self.uri, site.s3)

    def finished(self) -> dict[str, Trial]:
        """Trials that came to their end or diverged, by ID."""
        return {key: trial for key, trial in self._trials("trials/").items() if trial.state != "stopped"}

    def waiting(self) -> dict[str, Trial]:
        """Trials that came to the rung, by ID; those that went on to their end since are among them."""
        return self._trials("waiting/")

    def _trials(self, folder: str) -> dict[str, Trial]:
        found = [Trial(**json.loads(self._store.read(path))) for path in self._store.list(folder)]
        return {trial.id: trial for trial in found}

    def find(self, trial_id: str) -> Trial | None:
        """A trial, if it came to its end or diverged."""
        path = f"trials/{trial_id}.json"
        found = Trial(**json.loads(self._store.read(path))) if self._store.exists(path) else None
        return None if found is None or found.state == "stopped" else found

    def started(self) -> dict[str, Changes]:
        """What trials that ever began change, by ID."""
        paths = self._store.list("started/")
        return {
            path.removeprefix("started/").removesuffix(".json"): json.loads(self._store.read(path)) for path in paths
        }

    def codes(self) -> Codes:
        """The code that made its trials; none before the first one."""
        if not self._store.list("started/"):
            return ()
        return codes_of(json.loads(self._store.read(CODES)) if self._store.exists(CODES) else None)

    def record_codes(self, codes: Codes) -> None:
        """Trials to come are made by the last of these."""
        self._store.write(CODES, json.dumps(recorded(codes)).encode())

    def start(self, trial_id: str, changes: Changes) -> None:
        """A trial begins."""
        self._store.write_if_absent(f"started/{trial_id}.json", json.dumps(changes).encode())

    def wait(self, trial: Trial) -> None:
        """A trial is at the rung. Its checkpoints stay."""
        self._store.write_if_absent(f"waiting/{trial.id}.json", _content(trial))

    def finish(self, trial: Trial) -> bool:
        """A trial came to its end; False if that was known, which then stays. Its checkpoints are removed."""
        path = f"trials/{trial.id}.json"
        is_first = self._store.write_if_absent(path, _content(trial))
        if not is_first and self.find(trial.id) is None:  # earlier versions kept here that a trial was stopped
            self._store.write(path, _content(trial))
            is_first = True
        self.checkpoints(trial.id).remove_all()
        return is_first

    def tidy(self) -> None:
        """Remove what is left of checkpoints of trials that are over: a driver died while it did."""
        over = self.finished()
        for trial_id in {path.split("/")[1] for path in self._store.list("checkpoints/")}:
            if trial_id in over:
                self.checkpoints(trial_id).remove_all()

    def checkpoints(self, trial_id: str) -> Checkpoints:
        """A trial's checkpoints."""
        return Checkpoints(open_store(f"{self.uri}/checkpoints/{trial_id}", self._site.s3), keep=1)


def sweep_in_use(site: Site, plan: SweepPlan, other_code: OtherCode) -> SweepPlan:
    """The plan under the name that its sweep has, or will have, on the store."""
    sweeps = open_store(site.sweeps_uri, site.s3)
    first = dataclasses.replace(plan, is_first_name=True)
    if first_that_exists(sweeps, [plan.name, first.name]) == first.name:
        plan = first
    name = name_in_use(sweeps, plan.name, lambda each: SweepStore(site, each).codes(), other_code)
    return dataclasses.replace(plan, again=name.removeprefix(plan.name))


def is_over(plan: SweepPlan, store: SweepStore, ids: set[str] | None, total: int) -> bool:
    """Whether none of the sweep's trials is left to train: those of `ids`, or any so many."""
    finished = store.finished()
    there = {key: trial for key, trial in (store.waiting() | finished).items() if ids is None or key in ids}
    if len(there) < total:
        return False
    if plan.rung is None:
        return there.keys() <= finished.keys()
    return going_on(plan, list(there.values()), max(total, len(there))) <= finished.keys()


def _content(trial: Trial) -> bytes:
    return json.dumps(dataclasses.asdict(trial), indent=1).encode()
