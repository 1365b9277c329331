"""What is known of a running sweep: kept, recorded and shown as Ray Tune's news come in."""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from ray.tune import Callback, Stopper

from ray_jobs.console import Console
from ray_jobs.space import Changes
from ray_jobs.sweep import Row, SweepPlan, SweepStore, Trial, ranked, settled
from ray_jobs.sweep_records import SweepRecords
from tavlad.errors import UserError

ChangesOf = Callable[[dict[str, Any]], Changes]
"""From what Ray Tune calls a trial's config to the fields it changes."""

_MOST_ROWS = 20


class _Running:
    """A trial that this process has heard of and that is not over. It waits where it stands at the rung."""

    def __init__(
        self, changes: Changes, rows: Sequence[Row] = (), state: Literal["waiting", "running", "failed"] = "running"
    ) -> None:
        self.changes = changes
        self.rows = list(rows)
        self.reason = ""
        self.refusal = ""
        self.state = state


class Progress:
    """The state of a sweep. Told by Ray Tune's thread, read by the one that shows it."""

    def __init__(
        self,
        plan: SweepPlan,
        store: SweepStore,
        records: SweepRecords,
        console: Console,
        total: int,
        ids: Collection[str] | None,
    ) -> None:
        """`ids` are the trials of this sweep, None where any may be."""
        self.over = {key: trial for key, trial in store.finished().items() if ids is None or key in ids}
        self.failed: dict[str, Exception] = {}
        self._plan = plan
        self._store = store
        self._records = records
        self._console = console
        self._total = total
        self._epochs = plan.trial_recipe({}).stage1.epochs
        self._running: dict[str, _Running] = {}
        for key, trial in store.waiting().items():
            if key not in self.over and (ids is None or key in ids):
                self._running[key] = _Running(trial.changes, trial.rows, "waiting")
        self._lock = threading.Lock()
        self._started: float | None = None
        """When the first trial of this process began: codebooks and features before it say nothing of the others."""
        self._epochs_done = 0
        self.stopping = False
        """Set when the user wants to stop: trials that end from then on are interrupted, not over."""

    def begin(self, changes: Changes) -> None:
        """A trial was started, perhaps again."""
        trial_id = self._plan.trial_id(changes)
        self._store.start(trial_id, changes)
        with self._lock:
            self._started = self._started or time.monotonic()
            if trial_id not in self._running:
                self._running[trial_id] = _Running(changes)
            self._running[trial_id].state = "running"
        self._records.begin(trial_id, changes)

    def add(self, changes: Changes, row: Row) -> None:
        """One epoch of a trial; one that was heard of before is passed over."""
        trial_id = self._plan.trial_id(changes)
        with self._lock:
            running = self._running[trial_id]
            if row["epoch"] <= len(running.rows):
                return
            running.rows.append(row)
            self._epochs_done += 1
        self._records.log_epoch(trial_id, row)

    def diverge(self, changes: Changes, reason: str) -> None:
        """A trial cannot be trained."""
        self._running[self._plan.trial_id(changes)].reason = reason

    def refuse(self, changes: Changes, reason: str) -> None:
        """A trial cannot go on before the user has mended something, which another try does not."""
        self._running[self._plan.trial_id(changes)].refusal = reason

    def waiting(self) -> list[Trial]:
        """Trials at the rung."""
        with self._lock:
            return [
                Trial(id=key, changes=each.changes, state="waiting", rows=each.rows)
                for key, each in self._running.items()
                if each.state == "waiting"
            ]

    def settle(self, ids: set[str], is_news: bool) -> list[Trial]:
        """Every trial but these has fallen behind at the rung; the ones of these that wait there. It is no news where
        it was so when the sweep was started."""
        over = {key: settled(self._plan, trial, ids) for key, trial in self.over.items()}
        cut = sum(trial is not self.over[key] for key, trial in over.items())
        if cut:
            self._console.say(
                f"  {cut} trials count as they stood at epoch {self._plan.rung}: they are not among the best here, but "
                "were when fewer trials were compared"
            )
        self.over, waiting = over, self.waiting()
        for trial in waiting:
            if trial.id not in ids:
                self._end(settled(self._plan, trial, ids), is_news)
        return [trial for trial in waiting if trial.id in ids]

    def end(self, changes: Changes) -> None:
        """A trial has come to its end, or to the rung."""
        trial_id = self._plan.trial_id(changes)
        running = self._running[trial_id]
        if self.stopping:
            return
        if running.refusal:
            self.fail(changes, UserError(running.refusal))
            return
        if trial_id in self.over:  # a search that draws as it goes may draw the same twice
            with self._lock:
                del self._running[trial_id]
            self._records.end(self.over[trial_id])
            return
        wanted = self._plan.trial_recipe(changes).stage1.epochs
        state = "diverged" if running.reason else "finished" if len(running.rows) >= wanted else "waiting"
        trial = Trial(id=trial_id, changes=changes, state=state, rows=running.rows, reason=running.reason)
        if state == "waiting":
            self._store.wait(trial)
            running.state = "waiting"
        else:
            self._store.finish(trial)
            self._end(trial)

    def _end(self, trial: Trial, is_news: bool = True) -> None:
        with self._lock:
            self.over[trial.id] = trial
            del self._running[trial.id]
        self._records.end(trial)
        if is_news and not self._console.is_terminal:
            self._console.say(self.line(trial))

    def fail(self, changes: Changes, error: Exception) -> None:
        """A trial failed more often than it is started again; the next start of the sweep tries it again."""
        trial_id = self._plan.trial_id(changes)
        self._running[trial_id].state = "failed"
        self.failed[trial_id] = error
        self._records.fail(trial_id)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        self._console.say(f"  trial {trial_id[:6]} failed ({described(changes)}): {reason}")

    def line(self, trial: Trial) -> str:
        """One plain line of a trial that is over, with the best so far."""
        best = ranked(list(self.over.values()))[0]
        result = trial.reason or f"held-out {trial.rows[-1]['held_out/top1']:.1%}"
        when = f"in epoch {trial.epochs + 1}" if trial.state == "diverged" else f"after epoch {trial.epochs}"
        return (
            f"  {len(self.over)}/{self._total} {trial.state} {when}, {result}: "
            f"{described(trial.changes)}; best {_top1(best)} with {described(best.changes)}; {self.left()}"
        )

    def left(self) -> str:
        """About how long it still takes, if no trial were stopped early."""
        with self._lock:
            waiting = self._total - len(self.over) - len(self._running)
            epochs = waiting * self._epochs + sum(self._epochs - len(each.rows) for each in self._running.values())
        if self._started is None or not self._epochs_done:
            return "time left unknown"
        seconds = max(0, epochs) * (time.monotonic() - self._started) / self._epochs_done
        at_most = "at most " if self._plan.rung else ""
        return f"{at_most}{seconds:.0f} s left" if seconds < 100 else f"{at_most}{seconds / 60:.0f} min left"

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, columns and rows: what runs, then the best of what is over."""
        with self._lock:
            running = [
                [key[:6], each.state, f"{len(each.rows)}/{self._epochs}", _last(each.rows), *_values(each.changes)]
                for key, each in self._running.items()
            ]
            over = ranked(list(self.over.values()))
        done = [
            [each.id[:6], each.state, f"{each.epochs}/{self._epochs}", _last(each.rows), *_values(each.changes)]
            for each in over[: max(3, _MOST_ROWS - len(running))]
        ]
        best = f", best {_top1(over[0])}" if over else ""
        title = f"{len(over)} of {self._total} trials are over{best}; {self.left()}"
        fields = [each.field for each in self._plan.dimensions]
        return title, ["trial", "state", "epoch", "held-out", *fields], running + done


class Listener(Callback):
    """Ray Tune's news, taken to the sweep's progress. Not part of what Ray Tune saves."""

    def __init__(self, progress: Progress, changes_of: ChangesOf) -> None:
        self._progress = progress
        self._changes_of = changes_of

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._progress.begin(self._changes_of(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        changes = self._changes_of(trial.config)
        if "diverged" in result:
            self._progress.diverge(changes, result["diverged"])
        elif "refused" in result:
            self._progress.refuse(changes, result["refused"])
        elif "row" in result:
            self._progress.add(changes, result["row"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._progress.end(self._changes_of(trial.config))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._progress.fail(self._changes_of(trial.config), trial.get_error() or RuntimeError("it died"))


class StopTrials(Stopper):
    """Stops all trials when asked to. At the rung they end by themselves: Ray Tune kills the trials that it stops, and
    the placement groups of their workers would stay."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def ask(self) -> None:
        """Stop everything soon."""
        self._asked.set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._asked.is_set()


def described(changes: Changes) -> str:
    """Such as "lr 0.003, num_clusters 64"."""
    return ", ".join(f"{name.rpartition('.')[2]} {_value(value)}" for name, value in changes.items())


def _values(changes: Changes) -> list[str]:
    return [_value(value) for value in changes.values()]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _last(rows: list[Row]) -> str:
    return f"{rows[-1]['held_out/top1']:.1%}" if rows else ""


def _top1(trial: Trial) -> str:
    return _last(trial.rows) if trial.state != "diverged" else "none"
