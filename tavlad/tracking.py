"""Tell MLflow how a run goes: what `tavlad.runlog` spooled, delivered in order and once.

Once: a metric is identified by its run, name and step. Before the first point of a name is delivered, and again after
every failure that leaves open whether the server took a batch, the steps the server has are asked for, and points it
has are left out. So an epoch done again after a crash is not drawn twice either; its first value stays. Parameters,
tags, artifacts and the end of a run come to the same when told twice.

Artifacts wait until all else is told, and then have a few tries: an artifact store that fails behind a server that
answers holds up no metric and no run's end. Those that are left wait for the next record that is no metric, the next
process over the same spool, or `tavlad deliver`.

System metrics travel through the spool too: MLflow's sampler stops for good at the first request that fails. Their step
is seconds since the run began; the step of all others is epochs.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from tavlad.runlog import RUN_TAG, NullTracker, RunLog, RunSpec, SpooledLog, Status, TrackingError
from tavlad.spool import (
    MAX_PARAM_CHARACTERS,
    MAX_TAG_CHARACTERS,
    Line,
    Mark,
    Record,
    Spool,
    split_long,
    without_credentials,
    without_user,
)

__all__ = [
    "RUN_TAG",
    "NullTracker",
    "RunLog",
    "RunSpec",
    "Status",
    "Tracker",
    "TrackingError",
    "comparison_url",
    "create_run",
    "deliver_spool",
]

_log = logging.getLogger(__name__)
_creating = threading.Lock()
_SECONDS_FOR_AN_ANSWER = 15.0  # a busy server is not a dead one, and a refused connection is known at once
_MAX_POINTS_PER_REQUEST = 1000
_MAX_ENTRIES_PER_REQUEST = 100
_MAX_DIGEST_CHARACTERS = 36
_MAX_FAILURES = 5  # of the artifact store, one after the other
_ARTIFACTS = ("artifact", "text")
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"}
"""Error codes that stay the same however often a request is repeated."""


class Tracker(SpooledLog):
    """One run's metrics, parameters, tags and artifacts on their way to MLflow; every call returns at once."""

    def __init__(self, tracking_uri: str, run: str | RunSpec, spool: Path) -> None:
        """Continue the run `run`; what an earlier process left in the folder `spool` is delivered first.

        SpoolError when another process holds the folder.
        """
        self._tracking_uri = tracking_uri
        super().__init__(run, spool, lambda opened: _Courier(tracking_uri, opened).deliver_next)

    def url(self, timeout: float | int = 30) -> str:
        """The run's page; the server's first page if it has not taken the run within `timeout` seconds."""
        address = without_user(self._tracking_uri)
        try:
            run = MlflowClient(self._tracking_uri).get_run(self.run_id(timeout))
        except (TrackingError, MlflowException):
            return address
        return f"{address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def create_run(
    tracking_uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    parent: str | None = None,
) -> str:
    """Find the run whose tag `tavlad.run` is that of `tags`, or create it; return its run id, its status RUNNING.

    Called once, in the driver. A run found again keeps its parameters; those that changed since are kept as tags
    `changed.NAME`. `parent` is the run id it is shown under. TrackingError when the server does not answer: a `RunSpec`
    given to `Tracker` creates the run when it does.
    """
    spec = RunSpec(experiment=experiment, name=name, tags=tags, params=params, parent=parent)
    require_answer(tracking_uri)
    client = MlflowClient(tracking_uri)
    try:
        run_id, texts = _find_or_create(client, spec)
        client.update_run(run_id, status="RUNNING")
        for each in texts:
            client.log_text(each["run_id"], each["text"], each["path"])
    except MlflowException as error:
        raise TrackingError(f"MLflow refused run {name!r} of experiment {experiment!r}: {_reason(error)}") from None
    return run_id


def deliver_spool(tracking_uri: str, spool: Path, timeout: float | int = 30) -> int:
    """Deliver what earlier processes left in the folder `spool`; return how many records stay in it."""
    holder = Spool(spool)
    courier = _Courier(tracking_uri, holder)
    deadline = time.monotonic() + timeout
    trouble = TrackingError(f"the time is over, {timeout} s")
    try:
        while time.monotonic() < deadline:
            try:
                if not courier.deliver_next():
                    break
            except TrackingError as error:
                trouble = error
                time.sleep(0.5)
        left = holder.count_undelivered()
        if left:
            _log.warning("%d records stay in %s: %s", left, spool, trouble)
        return left
    finally:
        holder.close()


def comparison_url(tracking_uri: str, experiment: str, tags: Mapping[str, str]) -> str:
    """The MLflow page that draws the curves of all runs of an experiment with these tags, the best on top.

    The server's first page when it does not answer or has no such experiment.
    """
    address = without_user(tracking_uri)
    try:
        require_answer(tracking_uri)
        found = MlflowClient(tracking_uri).get_experiment_by_name(experiment)
    except (TrackingError, MlflowException):
        return address
    if found is None:
        return address
    query = {
        "searchFilter": " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items()),
        "orderByKey": "metrics.`test/top1`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
    }
    return f"{address}/#/experiments/{found.experiment_id}/runs?{urlencode(query, quote_via=quote)}"


class _Courier:
    """Takes the records of a spool to the server, one request at a time, and moves the spool's mark after each."""

    def __init__(self, tracking_uri: str, spool: Spool) -> None:
        self._tracking_uri = tracking_uri
        self._client = MlflowClient(tracking_uri)
        self._spool = spool
        self._steps_told: dict[tuple[str, str], set[int]] = {}
        self._starts: dict[str, int] = {}
        self._failures = 0
        """Of the artifact store, one after the other."""

    def deliver_next(self) -> bool:
        """Deliver the next records; False when none are left, or only artifacts that had their tries.

        TrackingError when that must be tried again later.
        """
        lines = self._spool.undelivered(max_lines=100)
        if not lines and not (self._spool.mark.postponed and self._failures < _MAX_FAILURES):
            return False
        require_answer(self._tracking_uri)
        try:
            if lines:
                self._deliver_lines(lines)
            else:
                self._deliver_postponed()
        except (MlflowException, OSError) as error:
            self._steps_told.clear()
            raise TrackingError(f"MLflow at {without_user(self._tracking_uri)} failed: {_reason(error)}") from error
        return True

    def _deliver_lines(self, lines: list[Line]) -> None:
        group = _leading_metrics(lines)
        run_id = self._spool.mark.run_id
        if len(group) > 1 and run_id is not None:
            try:
                self._send_metrics(run_id, [line.record for line in group])
            except MlflowException as error:
                if error.error_code not in _REFUSALS:
                    raise
            else:
                self._spool.set_mark(replace(self._spool.mark, offset=group[-1].end))
                return
        for line in group or lines[:1]:
            self._deliver_line(line)

    def _deliver_line(self, line: Line) -> None:
        mark = replace(self._spool.mark, offset=line.end)
        record = line.record
        if record["kind"] != "metrics":  # of which there are many: the store has another try
            self._failures = min(self._failures, _MAX_FAILURES - 1)
        try:
            if record["kind"] == "run":
                mark = replace(mark, run_id=None)
                mark = self._go_on_with(record["run"], mark)
            elif mark.run_id is None:
                self._reject(record, "the run it belongs to was refused")
            elif record["kind"] in _ARTIFACTS:
                mark = self._postpone(mark, [{**record, "run_id": mark.run_id}])
            else:
                self._send(mark.run_id, record)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._reject(record, _reason(error))
        self._spool.set_mark(mark)

    def _postpone(self, mark: Mark, records: list[Record]) -> Mark:
        """The mark with these artifacts to be sent when no lines are left."""
        return replace(mark, postponed=(*mark.postponed, *(each for each in records if each not in mark.postponed)))

    def _deliver_postponed(self) -> None:
        mark = self._spool.mark
        record, *others = mark.postponed
        try:
            self._send(record["run_id"], record)
        except Exception as error:
            if not (isinstance(error, MlflowException) and error.error_code in _REFUSALS):
                self._failures += 1
                self._spool.set_mark(replace(mark, postponed=(*others, record)))
                raise TrackingError(f"MLflow's artifact store failed: {_reason(error)}") from error
            self._reject(record, _reason(error))
        else:
            self._failures = 0
        self._spool.set_mark(replace(mark, postponed=tuple(others)))

    def _reject(self, record: Record, reason: str) -> None:
        _log.warning("MLflow refused %s, kept in %s: %s", record["kind"], self._spool.folder, reason)
        self._spool.reject(record, reason)

    def _send(self, run_id: str, record: Record) -> None:
        match record["kind"]:
            case "metrics":
                self._send_metrics(run_id, [record])
            case "params":
                _log_new_params(self._client, run_id, record["values"])
            case "tags":
                _log_tags(self._client, run_id, record["values"])
            case "text":
                self._client.log_text(run_id, record["text"], record["path"])
            case "artifact":
                self._send_artifact(run_id, record)
            case "dataset":
                self._client.log_inputs(run_id, [_dataset_input(record)])
            case "finish":
                self._client.set_terminated(run_id, record["status"], end_time=record["time"])
            case kind:
                raise AssertionError(f"no such record: {kind}")

    def _send_metrics(self, run_id: str, records: list[Record]) -> None:
        points: dict[tuple[str, int], Metric] = {}
        for record in records:
            seconds = (record["time"] - self._start_of(run_id)) // 1000
            step = seconds if record["step"] is None else record["step"]
            for name, value in record["values"].items():
                if step not in self._steps_of(run_id, name):
                    points.setdefault((name, step), Metric(name, value, record["time"], step))
        if points:
            self._client.log_batch(run_id, metrics=list(points.values()), synchronous=True)
        for name, step in points:
            self._steps_of(run_id, name).add(step)

    def _steps_of(self, run_id: str, name: str) -> set[int]:
        if (run_id, name) not in self._steps_told:
            history = self._client.get_metric_history(run_id, name)
            self._steps_told[run_id, name] = {metric.step for metric in history}
        return self._steps_told[run_id, name]

    def _start_of(self, run_id: str) -> int:
        if run_id not in self._starts:
            self._starts[run_id] = self._client.get_run(run_id).info.start_time
        return self._starts[run_id]

    def _send_artifact(self, run_id: str, record: Record) -> None:
        copy = self._spool.kept(record["copy"])
        if copy.is_dir():
            self._client.log_artifacts(run_id, str(copy), "/".join(filter(None, [record["path"], copy.name])))
        elif copy.exists():
            self._client.log_artifact(run_id, str(copy), record["path"])
        self._spool.drop_copy(record["copy"])

    def _go_on_with(self, run: str | Record, mark: Mark) -> Mark:
        """The mark with a run that goes on, found or created."""
        run_id, texts = (run, []) if isinstance(run, str) else _find_or_create(self._client, RunSpec.from_record(run))
        self._client.update_run(run_id, status="RUNNING")
        return self._postpone(replace(mark, run_id=run_id), texts)


def _leading_metrics(lines: list[Line]) -> list[Line]:
    """The metrics lines before the first of another kind, as many as one request may hold."""
    group: list[Line] = []
    num_points = 0
    for line in lines:
        if line.record["kind"] != "metrics":
            break
        num_points += len(line.record["values"])
        if group and num_points > _MAX_POINTS_PER_REQUEST:
            break
        group.append(line)
    return group


def require_answer(tracking_uri: str) -> None:
    """TrackingError when no MLflow server answers at an http(s) address."""
    if not tracking_uri.startswith(("http://", "https://")):
        return
    remedy = "start it (`tavlad up` for the local site) or correct the site's MLflow address"
    try:
        answer = http_request(
            get_default_host_creds(tracking_uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=_SECONDS_FOR_AN_ANSWER,
            raise_on_status=False,
        )
    except (MlflowException, OSError):
        raise TrackingError(f"MLflow at {without_user(tracking_uri)} does not answer: {remedy}") from None
    assert answer is not None
    if answer.status_code >= 500:
        status = answer.status_code
        raise TrackingError(f"MLflow at {without_user(tracking_uri)} answers with status {status}: {remedy}")


def _find_or_create(client: MlflowClient, spec: RunSpec) -> tuple[str, list[Record]]:
    """The id of the run of this description, and the settings too long for MLflow, as texts that are yet to be sent.

    One thread at a time: two that find none would create two.
    """
    with _creating:
        return _find_or_create_alone(client, spec)


def _find_or_create_alone(client: MlflowClient, spec: RunSpec) -> tuple[str, list[Record]]:
    experiment_id = _experiment_id(client, spec.experiment)
    same_run = f"tags.`{RUN_TAG}` = '{spec.tags[RUN_TAG]}'"
    found = client.search_runs([experiment_id], same_run, max_results=1, order_by=["attributes.start_time ASC"])
    tags, long_tags = split_long("tags", without_credentials(spec.tags), MAX_TAG_CHARACTERS)
    params, long_params = split_long("params", without_credentials(spec.params), MAX_PARAM_CHARACTERS)
    texts: list[Record] = []
    if isinstance(spec.parent, RunSpec):
        tags["mlflow.parentRunId"], texts = _find_or_create_alone(client, spec.parent)
    elif spec.parent is not None:
        tags["mlflow.parentRunId"] = spec.parent
    if found:
        run_id = found[0].info.run_id
    else:
        run_id = client.create_run(experiment_id, tags={RUN_TAG: tags[RUN_TAG]}, run_name=spec.name).info.run_id
    _log_tags(client, run_id, tags)
    _log_new_params(client, run_id, params)
    for path, text in (long_tags | long_params).items():
        texts.append({"kind": "text", "run_id": run_id, "path": path, "text": text})
    return run_id, texts


def _experiment_id(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} was deleted: restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}`, or give the data set another name"
        )
    return experiment.experiment_id


def _log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    entries = [RunTag(name, value) for name, value in tags.items()]
    for start in range(0, len(entries), _MAX_ENTRIES_PER_REQUEST):
        client.log_batch(run_id, tags=entries[start : start + _MAX_ENTRIES_PER_REQUEST], synchronous=True)


def _log_new_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """MLflow writes a parameter once: those that changed in a continued run become tags `changed.NAME`."""
    present = client.get_run(run_id).data.params
    entries = [Param(name, value) for name, value in params.items() if name not in present]
    for start in range(0, len(entries), _MAX_ENTRIES_PER_REQUEST):
        client.log_batch(run_id, params=entries[start : start + _MAX_ENTRIES_PER_REQUEST], synchronous=True)
    changed = {f"changed.{name}": value for name, value in params.items() if present.get(name, value) != value}
    _log_tags(client, run_id, changed)


def _dataset_input(record: Record) -> DatasetInput:
    dataset = Dataset(
        name=record["name"],
        digest=record["fingerprint"][:_MAX_DIGEST_CHARACTERS],
        source_type="tavlad",
        source=record["uri"],
        profile=f'{{"fingerprint": "{record["fingerprint"]}"}}',
    )
    return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", record["context"])])


def _reason(error: Exception) -> str:
    return without_user(" ".join(str(error).split()))[:500]
