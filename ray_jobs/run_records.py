"""The MLflow runs of a training, as it goes on."""

import colorsys
import contextlib
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.site import Site
from ray_jobs.plan import TrainingPlan
from ray_jobs.provenance import UNKNOWN_CODE, Codes, code_tags, short
from shards.index import Index
from tavlad.errors import UserError
from tavlad.runlog import RUN_TAG, RunSpec
from tavlad.spool import Spool
from tavlad.tracking import Tracker, comparison_url, deliver_spool, require_answer

SECONDS_FOR_DELIVERY = 30.0
"""How long a verb waits at its end for what it told MLflow."""


class RunRecords:
    """The MLflow runs of one training: a parent and one for each stage. Nothing here waits for the server."""

    def __init__(self, site: Site, plan: TrainingPlan, index: Index, codes: Codes) -> None:
        """`codes` are the versions of the code that trained it, or are about to."""
        self.codes = codes
        """Of what it records."""
        self._site = site
        self._plan = plan
        self._folder = spools(site) / plan.name
        tags = {
            "dataset": plan.dataset_name,
            "split": str(plan.split),
            "variant": plan.recipe.model.variant,
            "fingerprint": plan.dataset_fingerprint,
            "recipe": plan.recipe.fingerprint(),
            "mlflow.runColor": _colour(plan.name),
        }
        if codes != (UNKNOWN_CODE,):  # or what the run says stays
            tags |= code_tags(codes)
        self._spec = RunSpec(
            experiment=f"tavlad/{plan.dataset_name}",
            # Legends are short, and the experiment says the set.
            name=f"{plan.recipe.model.variant} split{plan.split} {short(plan.name)}",
            tags={RUN_TAG: plan.name, "kind": "train", **tags},
            params=plan.recipe.flat() | {"split": plan.split},
        )
        self._tags = tags
        self._index = index
        self.parent = Tracker(site.mlflow_uri, self._spec, self._folder / "parent")
        self._log_dataset(self.parent)
        self._stages: dict[int, Tracker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in (*self._stages.values(), self.parent):
            if kind is not None:
                tracker.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
            tracker.close(SECONDS_FOR_DELIVERY)

    def log_epoch(self, row: dict[str, Any]) -> None:
        """One epoch's metrics, in its stage's run and, counted through both stages, in the training's.

        Told twice they are logged once.
        """
        metrics = {name: value for name, value in row.items() if name not in ("stage", "epoch")}
        self._stage(row["stage"]).log_metrics(metrics, step=row["epoch"])
        before = self._plan.recipe.stage1.epochs if row["stage"] == 2 else 0
        self.parent.log_metrics(metrics, step=before + row["epoch"])

    def log_system(self, stage: int, values: dict[str, float]) -> None:
        """How busy a machine is that trains this stage."""
        self._stage(stage).log_system(values)

    def comparison_url(self) -> str:
        """The page that compares this set's trainings of the split."""
        tags = {"kind": self._spec.tags["kind"], "split": str(self._plan.split)}
        return comparison_url(self._site.mlflow_uri, self._spec.experiment, tags)

    def finish(self) -> None:
        """The training is done. What an earlier process could not tell of its stages is told too."""
        for number, _ in self._plan.stages:
            if (self._folder / f"stage{number}").exists():
                self._stage(number)
        for tracker in (*self._stages.values(), self.parent):
            tracker.finish()

    def _stage(self, number: int) -> Tracker:
        if number not in self._stages:
            spec = RunSpec(
                experiment=self._spec.experiment,
                name=f"stage{number}",
                tags={RUN_TAG: f"{self._plan.name}/stage{number}", "kind": f"stage{number}", **self._tags},
                params={**self._spec.params, "stage": number},
                parent=self._spec,
            )
            self._stages[number] = Tracker(self._site.mlflow_uri, spec, self._folder / f"stage{number}")
            self._log_dataset(self._stages[number])
        return self._stages[number]

    def _log_dataset(self, tracker: Tracker) -> None:
        plan = self._plan
        tracker.log_dataset(plan.dataset_name, self._index.fingerprint, plan.dataset_uri, f"split{plan.split}")


def _colour(name: str) -> str:
    """A training's colour in MLflow's charts; MLflow's own choice has twenty, and often gives two runs the same."""
    hue, lightness, *_ = hashlib.sha256(name.encode()).digest()
    red, green, blue = colorsys.hls_to_rgb(hue / 256, 0.3 + 0.3 * lightness / 256, 0.75)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def deliver_waiting(site: Site) -> dict[str, int]:
    """Tell MLflow what runs of this machine could not tell it; how many records wait still, by spool.

    Spools that a training holds now are left to it. TrackingError when the server does not answer.
    """
    require_answer(site.mlflow_uri)
    left: dict[str, int] = {}
    for lines in sorted(spools(site).glob("*/*/lines.jsonl")):
        name = f"{lines.parent.parent.name}/{lines.parent.name}"
        if not Spool.is_held(lines.parent):
            left[name] = deliver_spool(site.mlflow_uri, lines.parent, SECONDS_FOR_DELIVERY)
    return left


def spools(site: Site) -> Path:
    """Where this machine keeps what it still has to tell the site's MLflow, for this user alone.

    UserError when somebody else has made that folder.
    """
    if site.state is not None:
        return site.state / "spool"
    temporary = Path(tempfile.gettempdir())
    private = temporary / f"tavlad-spool-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    made = private.lstat()
    if not stat.S_ISDIR(made.st_mode) or made.st_uid != os.getuid():
        raise UserError(f"{private} is not a folder of yours: have it removed, or set TMPDIR to a folder of your own")
    private.chmod(0o700)
    folder = private / Path(site.name).stem
    folder.mkdir(exist_ok=True)
    _move_in(temporary / "tavlad" / "spool", folder)
    return folder


def _move_in(former: Path, folder: Path) -> None:
    """Take over what earlier code kept in one folder for all users and sites: this user's runs at rest."""
    for run in former.iterdir() if former.is_dir() else []:
        if run.lstat().st_uid != os.getuid() or any(Spool.is_held(each.parent) for each in run.glob("*/lines.jsonl")):
            continue
        place = folder / run.name
        with contextlib.suppress(FileNotFoundError):  # another process was a moment earlier
            run.rename(place.with_name(f"{run.name}.{time.time_ns()}") if place.exists() else place)
