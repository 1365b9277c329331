"""The MLflow runs of a sweep: one parent, and a run below it for each trial. Nothing here waits for the server."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.site import Site
from ray_jobs.provenance import UNKNOWN_CODE, Codes, code_tags, short
from ray_jobs.run_records import SECONDS_FOR_DELIVERY, spools
from ray_jobs.space import Changes
from ray_jobs.sweep import Row, SweepPlan, Trial, ranked
from shards.scratch import scratch
from shards.table import write_table
from tavlad import figures, sweep_figures
from tavlad.runlog import RUN_TAG, RunSpec, Status
from tavlad.tracking import Tracker


class SweepRecords:
    """A sweep's runs as it goes on."""

    def __init__(self, site: Site, plan: SweepPlan, codes: Codes) -> None:
        self._site = site
        self._plan = plan
        self._folder = spools(site) / plan.name
        training = plan.training
        self._tags = {
            "dataset": training.dataset_name,
            "split": str(training.split),
            "fingerprint": training.dataset_fingerprint,
        }
        if codes != (UNKNOWN_CODE,):  # or what the runs say stays
            self._tags |= code_tags(codes)
        space = {f"space.{each.field}": repr(each) for each in plan.dimensions}
        options = {
            "search": plan.options.search,
            "scheduler": plan.options.scheduler,
            "held_out_share": plan.options.share,
            "split": training.split,
        }
        self._spec = RunSpec(
            experiment=f"tavlad/{training.dataset_name}",
            name=f"sweep split{training.split} {short(plan.name)}",
            tags={RUN_TAG: plan.name, "kind": "sweep", **self._tags},
            params=training.recipe.flat() | space | options,
        )
        self.parent = Tracker(site.mlflow_uri, self._spec, self._folder / "parent")
        self.parent.log_dataset(
            training.dataset_name, training.dataset_fingerprint, training.dataset_uri, f"split{training.split}"
        )
        self._trials: dict[str, Tracker] = {}
        self._closer = ThreadPoolExecutor(1, "close-runs")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for trial_id in list(self._trials):
            self._finish(trial_id, "KILLED")
        self._closer.shutdown()
        if kind is not None:
            self.parent.finish("KILLED" if kind is KeyboardInterrupt else "FAILED")
        self.parent.close(SECONDS_FOR_DELIVERY)

    def begin(self, trial_id: str, changes: Changes) -> None:
        """A trial was started, perhaps again."""
        if trial_id in self._trials:
            return
        spec = RunSpec(
            experiment=self._spec.experiment,
            name=f"trial {trial_id[:6]}",
            tags={RUN_TAG: f"{self._plan.name}/{trial_id}", "kind": "trial", "state": "running", **self._tags},
            params=self._plan.trial_recipe(changes).flat() | {"split": self._plan.training.split},
            parent=self._spec,
        )
        self._trials[trial_id] = Tracker(self._site.mlflow_uri, spec, self._folder / trial_id)

    def log_epoch(self, trial_id: str, row: Row) -> None:
        """One epoch of a trial."""
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        self._trials[trial_id].log_metrics(metrics, step=row["epoch"])

    def end(self, trial: Trial) -> None:
        """A trial is over; one that was stopped early is marked so. Told twice it is the same as once."""
        self.begin(trial.id, trial.changes)
        for row in trial.rows:
            self.log_epoch(trial.id, row)
        tags: dict[str, Any] = {"state": trial.state, "early_stopped": str(trial.state == "stopped").lower()}
        self._trials[trial.id].set_tags(tags | ({"reason": trial.reason} if trial.reason else {}))
        self._finish(trial.id, "FAILED" if trial.state == "diverged" else "FINISHED")

    def fail(self, trial_id: str) -> None:
        """A trial could not be brought to its end this time."""
        self._trials[trial_id].set_tags({"state": "failed"})
        self._finish(trial_id, "FAILED")

    def _finish(self, trial_id: str, status: Status) -> None:
        tracker = self._trials.pop(trial_id)
        tracker.finish(status)
        self._closer.submit(tracker.close, SECONDS_FOR_DELIVERY)

    def conclude(self, trials: Sequence[Trial]) -> None:
        """The table of all trials, the pictures, and the best configuration, on the parent."""
        best = ranked(trials)[0]
        self.parent.set_tags({"best_trial": best.id} | {f"best.{name}": value for name, value in best.changes.items()})
        self.parent.log_metrics({"trials": len(trials), "epochs": sum(trial.epochs for trial in trials)}, step=0)
        if best.rows:
            last = {f"best/{name}": best.rows[-1][name] for name in ("held_out/top1", "held_out/loss")}
            self.parent.log_metrics(last, step=0)
        with scratch() as folder:
            for path in write_trials(folder, trials):
                self.parent.log_artifact(path)

    def finish(self) -> None:
        """The sweep is done."""
        self.parent.finish()


def write_trials(folder: Path, trials: Sequence[Trial]) -> list[Path]:
    """trials.parquet, one row a trial and the best first; a picture of all of them, and one of what mattered."""
    trials = ranked(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.changes))
    columns: dict[str, list[Any]] = {name: [trial.changes.get(name) for trial in trials] for name in names}
    top1 = [float(trial.rows[-1]["held_out/top1"]) if trial.rows else None for trial in trials]
    table = {
        "trial": [trial.id for trial in trials],
        "state": [trial.state for trial in trials],
        "epochs": [trial.epochs for trial in trials],
        "score": [trial.score for trial in trials],
        "held_out_top1": top1,
        "held_out_loss": [float(trial.rows[-1]["held_out/loss"]) if trial.rows else None for trial in trials],
    }
    paths = [folder / "trials.parquet"]
    write_table(paths[0], table | columns)
    shown = [trial for trial in trials if trial.rows]
    if shown:
        values = {name: [trial.changes[name] for trial in shown] for name in names}
        accuracy = [float(trial.rows[-1]["held_out/top1"]) for trial in shown]
        is_whole = [trial.state == "finished" for trial in shown]
        pictures = {"parallel_coordinates.png": sweep_figures.parallel_coordinates(values, accuracy, is_whole)}
        weights = sweep_figures.importance(values, [trial.score for trial in shown])
        if weights is not None:
            pictures["importance.png"] = sweep_figures.importance_bars(weights)
        for name, picture in pictures.items():
            (folder / name).write_bytes(figures.png(picture))
            paths.append(folder / name)
    return paths
