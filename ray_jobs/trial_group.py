"""A trial by several workers: Ray Train inside of Ray Tune. Its rows come by way of a monitor, as a training's do."""

import threading
import time
import uuid
from concurrent.futures import Future
from typing import Any

import ray.train
import ray.train.torch
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from infra.site import load_site
from ray_jobs.cluster import placement_groups, release
from ray_jobs.monitor import EpochDone, Monitor, Stopped
from ray_jobs.network import HostNetwork
from ray_jobs.space import Changes
from ray_jobs.trial import Report, TrialJob, run_trial
from shards.store import StoreUnreachable, arrow_filesystem
from tavlad.errors import UserError

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_WITHOUT_ACTORS = 10.0
_MOST_ACTORS = 10_000  # as many as Ray tells of


def run_trial_by_group(job: TrialJob, changes: Changes, report: Report) -> None:
    """`run_trial` by `SweepOptions.workers_per_trial` workers, each with a recipe's resources of one.

    Ray Tune ends a trial that it stops by ending its process: the monitor and the workers, which it owns, end with it.
    """
    monitor = Monitor.start()
    trainer = _trainer(job, changes, monitor)
    training: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            training.set_exception(error)
        else:
            training.set_result(None)

    # Of a daemon's kind, or the process would wait for the workers of a trial that was stopped.
    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    is_last_look = False
    while not is_last_look:
        is_last_look = _is_over(training)
        for news in monitor.read():
            if isinstance(news, EpochDone):
                report(news.row)
    error = monitor.error()
    monitor.stop()
    if error is not None:
        raise error
    training.result()


class Leftovers:
    """Placement groups that nobody uses any more, of trials by several workers in this driver's job.

    A trial's process may die while its workers start. Ray's cleaner of placement groups does not know of theirs yet, it
    would be kept while the job lasts, and the trial's next try would wait for what it holds.
    """

    def __init__(self, workers_per_trial: int) -> None:
        self._num_bundles = workers_per_trial
        self._unused: set[str] = set()
        self._looked = time.monotonic()

    def remove(self) -> None:
        """Remove those that had no actor for ten seconds; to be called again and again."""
        now = time.monotonic()
        if self._num_bundles == 1 or now - self._looked < _SECONDS_WITHOUT_ACTORS:
            return
        self._looked = now
        groups = {
            key
            for key, group in placement_groups().items()
            if group["state"] == "CREATED" and len(group["bundles"]) == self._num_bundles
        }
        of_this_job = ("job_id", "=", ray.get_runtime_context().get_job_id())
        try:
            actors: list[Any] = list_actors(
                filters=[of_this_job, ("state", "!=", "DEAD")], detail=True, limit=_MOST_ACTORS
            )
        except (RayStateApiException, ConnectionError):  # Ray's dashboard is busy
            return
        unused = groups - {actor.placement_group_id for actor in actors}
        for key in unused & self._unused:
            release(key)
        self._unused = unused


def _is_over(training: "Future[None]") -> bool:
    try:
        training.exception(timeout=_SECONDS_BETWEEN_LOOKS)
    except TimeoutError:
        return False
    return True


def _trainer(job: TrialJob, changes: Changes, monitor: Monitor) -> ray.train.torch.TorchTrainer:
    training = job.sweep.training
    resources = training.recipe.resources
    needs = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        needs["GPU"] = resources.gpus_per_worker
    site = load_site(training.site_name)
    filesystem, path = arrow_filesystem(f"{site.sweeps_uri}/{job.sweep.name}/ray", site.s3)
    return ray.train.torch.TorchTrainer(
        lambda: _work(job, changes, monitor),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.sweep.options.workers_per_trial,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=needs,
            placement_strategy=resources.placement,
        ),
        torch_config=HostNetwork(),
        # A name used twice would silently resume. A worker that is lost ends the group, and Ray Tune tries again.
        run_config=ray.train.RunConfig(name=uuid.uuid4().hex, storage_path=path, storage_filesystem=filesystem),
    )


def _work(job: TrialJob, changes: Changes, monitor: Monitor) -> None:
    """One rank."""
    try:
        run_trial(job, changes, lambda row: monitor.tell_surely(EpochDone(row=row)), ray.train.torch.get_device())
    except StoreUnreachable:  # later it may answer
        raise
    except UserError as error:
        monitor.tell_surely(Stopped(error=error))
        raise
