"""Word that a worker must soon go: SIGTERM, a node that Ray drains, a resize. All ranks hear of it at the same step.

A training that hears it writes a checkpoint, ends with `Left`, and is started again where there is room.
"""

import signal
import threading
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
_SECONDS_BETWEEN_LOOKS = 5.0
"""As often as Ray itself asks which nodes are drained."""

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

    def __init__(self, world: World) -> None:
        self._world = world
        self._next_look = monotonic() + _SECONDS_BETWEEN_LOOKS

    def heard(self) -> str | None:
        """Why to leave now, if there is a reason. All ranks must ask together, and get the same answer."""
        looks = self._world.rank == 0 and monotonic() >= self._next_look
        own = [float(reason in _told) for reason in _REASONS]
        *told, look = self._world.sum(torch.tensor([*own, float(looks)])).tolist()
        for reason, count in zip(_REASONS, told, strict=True):
            if count:
                return _TEXTS[reason]
        if look:
            self._next_look = monotonic() + _SECONDS_BETWEEN_LOOKS
            if ray.train.get_preemption_info() is not None:
                return _TEXTS["drain"]
        return None
