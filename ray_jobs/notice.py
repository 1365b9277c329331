"""Word that a worker must soon go: SIGTERM, a node that Ray drains, a resize, a user who ends the training. All ranks
hear of it at the same step.

A training that hears it writes a checkpoint and ends with `Left`; unless the user ended it, it is started again where
there is room.
"""

import signal
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Literal

import ray.train
import torch
from ray.train.v2._internal.execution.callback import WorkerCallback

from tavlad.parallel import World

Reason = Literal["SIGTERM", "resize"]
_REASONS: tuple[Reason, ...] = ("SIGTERM", "resize")
_TEXTS = {
    "SIGTERM": "a worker was told to end (SIGTERM)",
    "resize": "the number of workers changes",
    "drain": "a node is about to be taken away",
}
STOP = "the training is being stopped"
_SECONDS_BETWEEN_LOOKS = 5.0
"""As often as Ray itself asks which nodes are drained."""
_SECONDS_BETWEEN_QUESTIONS = 1.0

_told: set[Reason] = set()


class Left(Exception):
    """The training ended after a checkpoint because it was told to."""


def give_notice(reason: Reason) -> None:
    """Tell this worker's process. The training hears it after its next step."""
    _told.add(reason)


class ListenForSigterm(WorkerCallback):
    """Makes SIGTERM a notice in each worker; a second one ends the process as Ray would have."""

    def after_init_train_context(self) -> None:
        """Called by Ray in the main thread of a worker before it trains: only there can handlers be set."""
        assert threading.current_thread() is threading.main_thread()
        _told.clear()
        ended_by_ray = signal.getsignal(signal.SIGTERM)

        def handle(number: int, frame: FrameType | None) -> None:
            if "SIGTERM" in _told and callable(ended_by_ray):
                ended_by_ray(number, frame)
            give_notice("SIGTERM")

        signal.signal(signal.SIGTERM, handle)


class Notice:
    """What the ranks of a training were told, agreed on."""

    def __init__(self, world: World, is_stopping: Callable[[], bool]) -> None:
        """`is_stopping` tells whether the user ends the training; one rank asks it, about every second."""
        self._world = world
        self._is_stopping = is_stopping
        self._next_look = monotonic() + _SECONDS_BETWEEN_LOOKS
        self._next_question = 0.0

    def heard(self) -> str | None:
        """Why to leave now, if there is a reason. All ranks must ask together, and get the same answer."""
        looks = self._world.rank == 0 and monotonic() >= self._next_look
        own = [float(reason in _told) for reason in _REASONS]
        stops = self._world.rank == 0 and self._hears_the_user()
        *told, look, stop = self._world.sum(torch.tensor([*own, float(looks), float(stops)])).tolist()
        if stop:
            return STOP
        for reason, count in zip(_REASONS, told, strict=True):
            if count:
                return _TEXTS[reason]
        if look:
            self._next_look = monotonic() + _SECONDS_BETWEEN_LOOKS
            if ray.train.get_preemption_info() is not None:
                return _TEXTS["drain"]
        return None

    def _hears_the_user(self) -> bool:
        if monotonic() < self._next_question:
            return False
        self._next_question = monotonic() + _SECONDS_BETWEEN_QUESTIONS
        return self._is_stopping()
