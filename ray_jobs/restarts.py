"""What happens when a training loses workers: seen from Ray Train's controller, told to the driver, bounded.

Restarts after a notice (SIGTERM, a drained node, a resize) are not counted. Others are, since the last new checkpoint;
they wait longer each time. What the user must mend ends the training at once.
"""

import time
import traceback
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling.default import (
    _is_preemption_failure,  # pyright: ignore[reportPrivateUsage]
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from ray_jobs.cluster import NODE_OUT_OF_MEMORY
from ray_jobs.monitor import Cause, Leaving, Monitor, Said, Stopped
from ray_jobs.notice import give_notice
from ray_jobs.plan import TrainingPlan
from tavlad.errors import UserError

_SECONDS_FOR_A_CHECKPOINT = 60.0
_COLLATERAL = ("gloo", "NCCL", "DistBackendError", "DistNetworkError")
"""Words in the errors of workers that were waiting for one that died."""


class Restarts(ControllerCallback, WorkerGroupCallback):
    """Ray Train's controller calls it; it runs there."""

    def __init__(self, monitor: Monitor, plan: TrainingPlan) -> None:
        self._monitor = monitor
        self._plan = plan
        self._group: WorkerGroup | None = None
        self._told_of_waiting = False
        self._began = 0.0

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Measure from here how long it takes."""
        self._began = time.monotonic()

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Remember whom to tell of a resize."""
        self._group = worker_group
        seconds = time.monotonic() - self._began
        self._monitor.tell(Said(text=f"{len(worker_group)} workers are up and connected, after {seconds:.1f} s"))

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Raising here ends the training: Ray tries no further."""
        if isinstance(current_state, RestartingState):
            if isinstance(previous_state, RestartingState):
                self._wait_for_room()
                return
            self._told_of_waiting = False
            self._lost(current_state.training_failed_error)
        elif isinstance(current_state, ReschedulingState):
            if _is_death_at_the_start(current_state.training_failed_error) and current_state is not previous_state:
                self._lost(current_state.training_failed_error)
            else:
                self._wait_for_room()
        elif isinstance(current_state, ResizingState):
            decision = current_state.scaling_decision
            assert isinstance(decision, ResizeDecision)
            self._prepare_resize(decision.num_workers)

    def _lost(self, error: TrainingFailedError) -> None:
        if lacked_memory(error):
            self._monitor.tell_surely(Stopped(error=UserError(NODE_OUT_OF_MEMORY)))
        elif _is_preemption_failure(error) and not self._monitor.has_left():
            self._monitor.tell_surely(Leaving(text="a node was taken away: starting again"))
        seconds = self._monitor.lost(cause_of(error), self._plan)
        if seconds is None:
            raise RuntimeError("the training is not started again: see the driver's message")
        time.sleep(seconds)

    def _wait_for_room(self) -> None:
        if not self._told_of_waiting:
            self._told_of_waiting = True
            self._monitor.tell(Said(text="waiting until the cluster has room for the workers"))

    def _prepare_resize(self, num_workers: int) -> None:
        """Let the workers write a checkpoint before they are replaced."""
        assert self._group is not None, "only what runs is resized"
        self._monitor.tell(Said(text=f"the cluster has room for {num_workers} workers: going on with so many"))
        told: list[Any] = [each.execute_async(give_notice, "resize") for each in self._group.get_workers()]
        try:
            ray.get(told)
        except RayActorError:
            return  # who died before the resize writes nothing
        deadline = time.monotonic() + _SECONDS_FOR_A_CHECKPOINT
        while not self._monitor.has_left() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._monitor.start_anew()


def lacked_memory(error: Exception) -> bool:
    """Whether Ray ended a worker, before or while it trained, or the controller, since a node's memory was full."""
    failures = [error.controller_failure] if isinstance(error, ControllerError) else [error, *_deaths(error).values()]
    return any(isinstance(each, OutOfMemoryError) for each in failures)


def _is_death_at_the_start(error: Exception) -> bool:
    """Whether workers were lost before they trained; what Ray waits for otherwise is room for them."""
    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupFailedError | RayActorError
    )


def _deaths(error: Exception) -> dict[int, Exception]:
    """How workers died, by rank."""
    failures: dict[int, Any] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return {
        rank: each.health_check_failure
        for rank, each in sorted(failures.items())
        if isinstance(each, WorkerHealthCheckFailedError)
    }


def cause_of(error: Exception) -> Cause:
    """The first cause in one sentence, and the traceback of what failed if it is no machine's or user's."""
    if _is_death_at_the_start(error):
        return Cause(text="a worker died, or its node was lost, while the workers were starting")
    if isinstance(error, RayActorError | ControllerError):
        failure = error.controller_failure if isinstance(error, ControllerError) else error
        ours = None if isinstance(failure, RayActorError) else "".join(traceback.format_exception(failure))
        return Cause(text="Ray's controller of the training was lost", traceback=ours)
    if died := _deaths(error):
        return Cause(text=f"worker {', '.join(map(str, died))} died, or its node was lost")
    failures: dict[int, Any] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for rank, each in sorted(failures.items()):
        last_line = (str(each).strip().splitlines() or [type(each).__name__])[-1]  # before it is a traceback
        if not any(word in last_line for word in _COLLATERAL):
            raised = getattr(each, "_base_exc", each)  # Ray has no other name for it
            ours = None if isinstance(raised, UserError) else str(each)
            return Cause(text=f"worker {rank} failed: {last_line}", traceback=ours)
    return Cause(text="a worker was lost: the others' connections to it broke")
