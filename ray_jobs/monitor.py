"""How the workers of a training tell the driver what happens: an actor that holds the news until it is read."""

from dataclasses import dataclass
from typing import Any

import ray

from ray_jobs.cluster import on_this_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The workers are up; `history` holds the epochs that a checkpoint remembers."""

    resumed_from: str | None
    history: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """Something for the user to know, such as a decision."""

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
class UserError:
    """Something the user must mend; starting again would not help."""

    text: str


News = Started | Said | Stepped | EpochDone | UserError


class _Monitor:
    """The newest step count and all other news, in order."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._error: str | None = None

    def tell(self, news: News) -> None:
        if isinstance(news, UserError):
            self._error = self._error or news.text
        if isinstance(news, Stepped) and self._news and isinstance(self._news[-1], Stepped):
            self._news.pop()
        self._news.append(news)

    def read(self) -> list[News]:
        news, self._news = self._news, []
        return news

    def error(self) -> str | None:
        return self._error


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

    def error(self) -> str | None:
        """The first thing that the user must mend, if any was told."""
        return ray.get(self._handle.error.remote())

    def stop(self) -> None:
        """End the actor."""
        ray.kill(self._handle)
