"""What a run says about itself, and when it is said; knows no MLflow.

Training never waits for the tracking server: every record is written to a spool on this machine first, and a thread
delivers the spool in order whenever the server answers, in this process or in a later one over the same folder.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from tavlad.errors import UserError
from tavlad.spool import (
    MAX_PARAM_CHARACTERS,
    MAX_TAG_CHARACTERS,
    Record,
    Spool,
    check_name,
    split_long,
    without_credentials,
    without_user,
)

RUN_TAG = "tavlad.run"
"""The tag by which a run is found again: what the run is, the same whenever it is started again."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

_log = logging.getLogger(__name__)
_MAX_SECONDS_BETWEEN_TRIES = 10.0


class TrackingError(UserError):
    """The tracking server cannot be used; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What a run is, for a server that may not answer yet: a tracker given this finds or creates the run later."""

    experiment: str
    name: str
    tags: Mapping[str, str]
    """Must hold `tavlad.run`; at most one run of the experiment has this value."""
    params: Mapping[str, Any]
    parent: "str | RunSpec | None" = None
    """Run id or description of the run this one is shown under."""

    def __post_init__(self) -> None:
        identity = self.tags.get(RUN_TAG, "")
        if not identity or "'" in identity:
            raise ValueError(f"tag {RUN_TAG} is {identity!r}; it must say which run this is, without quotes")

    def to_record(self) -> Record:
        """The description as JSON can hold it, without credentials."""
        parent = self.parent
        return {
            "experiment": self.experiment,
            "name": self.name,
            "tags": without_credentials(self.tags),
            "params": without_credentials(self.params),
            "parent": parent.to_record() if isinstance(parent, RunSpec) else parent,
        }

    @classmethod
    def from_record(cls, record: Record) -> "RunSpec":
        """The description that `to_record` wrote."""
        parent = record["parent"]
        return cls(
            experiment=record["experiment"],
            name=record["name"],
            tags=record["tags"],
            params=record["params"],
            parent=cls.from_record(parent) if isinstance(parent, dict) else parent,
        )


@runtime_checkable
class RunLog(Protocol):
    """What a training tells about itself; `Tracker` tells MLflow, `NullTracker` nobody."""

    def log_metrics(self, values: Mapping[str, float | int], step: int) -> None: ...
    def log_params(self, values: Mapping[str, Any]) -> None: ...
    def set_tags(self, values: Mapping[str, Any]) -> None: ...
    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None: ...
    def log_dataset(self, name: str, fingerprint: str, uri: str, context: str) -> None: ...
    def finish(self, status: Status = "FINISHED") -> None: ...
    def close(self, timeout: float | int = 30) -> int: ...


class NullTracker:
    """The tracker that is off."""

    def log_metrics(self, values: Mapping[str, float | int], step: int) -> None: ...
    def log_params(self, values: Mapping[str, Any]) -> None: ...
    def set_tags(self, values: Mapping[str, Any]) -> None: ...
    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None: ...
    def log_dataset(self, name: str, fingerprint: str, uri: str, context: str) -> None: ...
    def finish(self, status: Status = "FINISHED") -> None: ...

    def close(self, timeout: float | int = 30) -> int:
        return 0


Deliver = Callable[[], bool]
"""Delivers the next records of a spool; False when none can be for now, TrackingError when that must be tried again."""


class SpooledLog:
    """A run's log that goes to a spool at once, and from there to a courier on a thread of its own."""

    def __init__(self, run: str | RunSpec, spool: Path, make_courier: Callable[[Spool], Deliver]) -> None:
        """Continue the run `run`; what an earlier process left in the folder `spool` is delivered first.

        SpoolError when another process holds the folder.
        """
        self._spool = Spool(spool)
        self._begins_at = self._spool.append({"kind": "run", "run": run if isinstance(run, str) else run.to_record()})
        self._trouble: TrackingError | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        deliver_next = make_courier(self._spool)
        self._courier = threading.Thread(target=self._deliver, args=(deliver_next,), name="courier", daemon=True)
        self._courier.start()

    def log_metrics(self, values: Mapping[str, float | int], step: int) -> None:
        """Points of curves at `step` (the epoch). A point told before, by name and step, is not told again."""
        points = {check_name("metric", name): float(value) for name, value in values.items()}
        self._tell({"kind": "metrics", "step": step, "time": _now(), "values": points})

    def log_system(self, values: Mapping[str, float]) -> None:
        """How busy machines are, now: MLflow draws it apart from the curves of training, over the seconds."""
        points = {check_name("metric", f"system/{name}"): float(value) for name, value in values.items()}
        self._tell({"kind": "metrics", "step": None, "time": _now(), "values": points}, durable=False)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Settings of the run, flat. One too long for MLflow becomes an artifact and a note that points to it."""
        params, texts = split_long("params", without_credentials(values), MAX_PARAM_CHARACTERS)
        self._tell({"kind": "params", "values": params})
        self._tell_texts(texts)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Tags of the run; a later value takes the place of an earlier one."""
        tags, texts = split_long("tags", without_credentials(values), MAX_TAG_CHARACTERS)
        self._tell({"kind": "tags", "values": tags})
        self._tell_texts(texts)

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """A file, or a folder with its name, under `artifact_path`; copied now, so the caller may change it after."""
        self._tell({"kind": "artifact", "copy": self._spool.keep_copy(path), "path": artifact_path})

    def log_dataset(self, name: str, fingerprint: str, uri: str, context: str) -> None:
        """The data the run used: `context` is what for ("training", "test")."""
        entry = {"name": name, "fingerprint": fingerprint, "uri": without_user(uri), "context": context}
        self._tell({"kind": "dataset", **entry})

    def finish(self, status: Status = "FINISHED") -> None:
        """Say that the run ended."""
        self._tell({"kind": "finish", "status": status, "time": _now()})

    def run_id(self, timeout: float | int = 30) -> str:
        """The server's id of this run, once it has it; TrackingError after `timeout` seconds without."""
        deadline = time.monotonic() + timeout
        while self._spool.mark.offset < self._begins_at:
            if time.monotonic() > deadline:
                trouble = self._trouble or TrackingError("the tracking server has not taken the run yet")
                raise TrackingError(f"{trouble}; records wait in {self._spool.folder}, try again later")
            time.sleep(0.02)
        run_id = self._spool.mark.run_id
        if run_id is None:
            raise TrackingError(f"the tracking server refused this run: {self._spool.folder}/rejected.jsonl says why")
        return run_id

    def close(self, timeout: float | int = 30) -> int:
        """Try to deliver what is left for at most `timeout` seconds; return how many records stay in the spool."""
        deadline = time.monotonic() + timeout
        self._closing.set()
        self._wake.set()
        self._courier.join(timeout=max(0.0, deadline - time.monotonic()))
        self._abandoned.set()
        left = self._spool.count_undelivered()
        if left:
            waiting = "%d records for MLflow wait in %s for the next process, or for `tavlad deliver`"
            _log.warning(waiting, left, self._spool.folder)
        if not self._courier.is_alive():
            self._spool.close()
        return left

    def _tell(self, record: Record, *, durable: bool = True) -> None:
        self._spool.append(record, durable=durable)
        self._wake.set()

    def _tell_texts(self, texts: Mapping[str, str]) -> None:
        for path, text in texts.items():
            self._tell({"kind": "text", "path": path, "text": text})

    def _deliver(self, deliver_next: Deliver) -> None:
        seconds_to_next_try = 0.0
        while not self._abandoned.is_set():
            closing = self._closing.is_set()
            self._wake.clear()
            try:
                while deliver_next() and not self._abandoned.is_set():
                    pass
            except TrackingError as error:
                if self._trouble is None:
                    _log.warning("%s; the run goes on, its records wait in %s", error, self._spool.folder)
                self._trouble = error
                seconds_to_next_try = min(max(0.5, 2 * seconds_to_next_try), _MAX_SECONDS_BETWEEN_TRIES)
                if closing:
                    self._abandoned.wait(0.5)
                else:
                    self._closing.wait(seconds_to_next_try)
                continue
            if self._trouble is not None and not self._spool.mark.postponed:
                _log.warning("MLflow answers again, nothing was lost")
                self._trouble = None
            seconds_to_next_try = 0.0
            if closing:
                return
            self._wake.wait()
        self._spool.close()


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000
