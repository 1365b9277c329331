"""How the workers of a training tell the driver what happens: an actor that holds the news until it is read."""

from dataclasses import dataclass
from typing import Any

import ray

from infra.site import load_site
from ray_jobs.cluster import on_this_node
from ray_jobs.plan import TrainingPlan
from shards.store import StoreUnreachable
from tavlad.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The workers are up; `history` holds the epochs that a checkpoint remembers."""

    resumed_from: str | None
    history: list[dict[str, Any]]
    num_workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """Something for the user to know, such as a decision."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """The workers are gone, and why; what happens next."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving:
    """The workers end by themselves, with a checkpoint, because they were told to."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """Steps done and to do in one stage."""

    stage: int
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochDone:
    """One epoch's row: stage, epoch and metrics."""

    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """How busy a machine of the training is, while a stage is trained."""

    stage: int
    values: dict[str, float]
    """Such as "node1/cpu_utilization_percentage"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """The training ends: it is the user's to mend, or was tried often enough."""

    error: Exception


News = Started | Said | Lost | Leaving | Stepped | EpochDone | Sampled | Stopped


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """Why workers were lost."""

    text: str
    """One sentence."""
    traceback: str | None = None
    """Of a mistake of ours or of a library; None where a machine failed, or what the user must mend."""


class GivenUp(Exception):
    """A training that failed again and again; the message has the traceback of the worker that failed last."""


_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 300.0


class _Monitor:
    """The newest step count and all other news, in order."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._error: Exception | None = None
        self._is_leaving = False
        self._is_stopping = False
        self._restarts = 0  # since the last new checkpoint
        self._newest: str | None = None

    def tell(self, news: News) -> None:
        if isinstance(news, Stopped):
            self._error = self._error or news.error
        if isinstance(news, Leaving):
            self._is_leaving = True
        if isinstance(news, Stepped) and self._news and isinstance(self._news[-1], Stepped):
            self._news.pop()
        self._news.append(news)

    def read(self) -> list[News]:
        news, self._news = self._news, []
        return news

    def error(self) -> Exception | None:
        return self._error

    def has_left(self) -> bool:
        return self._is_leaving

    def start_anew(self) -> None:
        self._is_leaving = False

    def ask_to_stop(self) -> None:
        self._is_stopping = True

    def is_stopping(self) -> bool:
        return self._is_stopping

    def lost(self, cause: Cause, max_restarts: int, newest: str | None) -> float | None:
        if self._error is not None or self._is_stopping:
            return None
        if newest is not None and newest != self._newest:
            self._newest, self._restarts = newest, 0
        if self._is_leaving:
            self._is_leaving = False
            return 0.0
        self._restarts += 1
        if self._restarts > max_restarts:
            text = (
                f"{cause.text}; it was started again {max_restarts} times without reaching a new checkpoint "
                "(resources.max_restarts): what the workers said is in Ray's logs"
            )
            self._error = UserError(text) if cause.traceback is None else GivenUp(f"{text}\n\n{cause.traceback}")
            self._news.append(Stopped(error=self._error))
            return None
        # The first time at once: most losses are a machine's, and happen once.
        pause = 0.0 if self._restarts == 1 else min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._restarts - 2))
        when = f"in {pause:g} s" if pause else "now"
        count = f"restart {self._restarts} of at most {max_restarts} without a new checkpoint"
        self._news.append(Lost(text=f"{cause.text}; starting again {when} ({count})"))
        return pause


class Monitor:
    """The actor's door; it can be handed to workers."""

    def __init__(self, handle: Any) -> None:  # Ray's actor types do not describe remote calls
        self._handle = handle

    @staticmethod
    def start() -> "Monitor":
        """Start the actor on the driver's side; it lives as long as the driver."""
        return Monitor(ray.remote(**on_this_node())(_Monitor).remote())

    def tell(self, news: News) -> None:
        """Leave news without waiting."""
        self._handle.tell.remote(news)

    def tell_surely(self, news: News) -> None:
        """Leave news and wait until it is held."""
        ray.get(self._handle.tell.remote(news))

    def read(self) -> list[News]:
        """Take all news since the last time."""
        return ray.get(self._handle.read.remote())

    def error(self) -> Exception | None:
        """The first reason to end the training, if any was told."""
        return ray.get(self._handle.error.remote())

    def has_left(self) -> bool:
        """Whether the workers told that they leave, and nobody has asked for new ones since."""
        return ray.get(self._handle.has_left.remote())

    def start_anew(self) -> None:
        """New workers take over from those that left."""
        ray.get(self._handle.start_anew.remote())

    def ask_to_stop(self) -> None:
        """The user ends the training: workers leave after their next step, and none are started again."""
        ray.get(self._handle.ask_to_stop.remote())

    def is_stopping(self) -> bool:
        """Whether that was asked."""
        return ray.get(self._handle.is_stopping.remote())

    def lost(self, cause: Cause, plan: TrainingPlan) -> float | None:
        """The workers are gone: seconds to wait before new ones start, or None for never. After `Leaving` at once.

        Whether there is a new checkpoint the store says: a worker may die between writing one and telling of it.
        """
        try:
            names = plan.checkpoints(load_site(plan.site_name)).names()
        except StoreUnreachable:
            names = []
        newest = names[-1] if names else None
        return ray.get(self._handle.lost.remote(cause, plan.recipe.resources.max_restarts, newest))

    def stop(self) -> None:
        """End the actor."""
        ray.kill(self._handle)
