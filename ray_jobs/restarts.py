"""What happens when a training loses workers: seen from Ray Train's controller, told to the driver, bounded.

Restarts after a notice (SIGTERM, a drained node, a resize) are not counted. Others are, since the last new checkpoint;
they wait longer each time. What the user must mend ends the training at once.
"""

import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ray_jobs.monitor import Monitor, Said
from ray_jobs.notice import give_notice

_SECONDS_FOR_A_CHECKPOINT = 60.0
_COLLATERAL = ("gloo", "NCCL", "DistBackendError", "DistNetworkError")
"""Words in the errors of workers that were waiting for one that died."""


class Restarts(ControllerCallback, WorkerGroupCallback):
    """Ray Train's controller calls it; it runs there."""

    def __init__(self, monitor: Monitor, max_restarts: int) -> None:
        self._monitor = monitor
        self._max_restarts = max_restarts
        self._group: WorkerGroup | None = None
        self._told_of_waiting = False

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Remember whom to tell of a resize."""
        self._group = worker_group

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Raising here ends the training: Ray tries no further."""
        if isinstance(current_state, RestartingState):
            if isinstance(previous_state, RestartingState):
                self._wait_for_room()
                return
            self._told_of_waiting = False
            seconds = self._monitor.lost(_cause(current_state.training_failed_error), self._max_restarts)
            if seconds is None:
                raise RuntimeError("the training is not started again: see the driver's message")
            time.sleep(seconds)
        elif isinstance(current_state, ReschedulingState):
            self._wait_for_room()
        elif isinstance(current_state, ResizingState):
            decision = current_state.scaling_decision
            assert isinstance(decision, ResizeDecision)
            self._prepare_resize(decision.num_workers)

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


def _cause(error: TrainingFailedError) -> str:
    """The first cause in one sentence, without a traceback."""
    failures: dict[int, Any] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    died = sorted(rank for rank, each in failures.items() if isinstance(each, WorkerHealthCheckFailedError))
    if died:
        return f"worker {', '.join(map(str, died))} died, or its node was lost"
    for rank, each in sorted(failures.items()):
        last_line = (str(each).strip().splitlines() or [type(each).__name__])[-1]  # before it is a traceback
        if not any(word in last_line for word in _COLLATERAL):
            return f"worker {rank} failed: {last_line}"
    return "a worker was lost: the others' connections to it broke"
