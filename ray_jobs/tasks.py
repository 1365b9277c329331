"""Many Ray tasks behind one bar of progress: few enough in flight, heard of clip by clip, ended together."""

import itertools
from collections.abc import Iterable
from typing import Any

import ray

from ray_jobs.cluster import num_cpus, on_this_node, result_of
from ray_jobs.console import Console

_TASKS_PER_CPU = 2  # in flight: enough to keep every CPU busy, few enough to stop soon
_SECONDS_BETWEEN_LOOKS = 0.5


class _Counter:
    """How many clips each task has done. A task that starts again begins from nothing, so counts are kept by task."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._notes: dict[int, str] = {}

    def tell(self, task: int, done: int, note: str) -> None:
        self._done[task], self._notes[task] = done, note

    def read(self) -> tuple[int, str]:
        return sum(self._done.values()), next((note for note in self._notes.values() if note), "")


class Progress:
    """One task's door to the bar; it goes to the task as an argument."""

    def __init__(self, counter: Any, task: int) -> None:  # Ray's actor types do not describe remote calls
        self._counter, self._task = counter, task

    def __call__(self, done: int, note: str = "") -> None:
        """Tell how many clips are done, without waiting."""
        self._counter.tell.remote(self._task, done, note)


def run_tasks(task: Any, calls: Iterable[tuple[Any, ...]], label: str, total: int, console: Console) -> list[Any]:
    """What a Ray task returns for each of the calls, in their order; its last argument is a `Progress`.

    `total` counts clips, not calls, which are made up only when their turn comes. The first failure ends the others.
    """
    counter: Any = ray.remote(**on_this_node())(_Counter).remote()
    waiting = enumerate(calls)
    running: dict[Any, int] = {}
    results: dict[int, Any] = {}
    try:
        with console.progress(label, total) as advance:
            while True:
                # More than enough are in flight where a node has left; Ray runs again what ran there.
                room = max(0, _TASKS_PER_CPU * num_cpus() - len(running))
                for number, call in itertools.islice(waiting, room):
                    running[task.remote(*call, Progress(counter, number))] = number
                if not running:
                    break
                finished, _ = ray.wait(list(running), num_returns=1, timeout=_SECONDS_BETWEEN_LOOKS)
                for reference in finished:
                    results[running.pop(reference)] = result_of(reference)
                advance(*ray.get(counter.read.remote()))
            advance(total, "")
    finally:
        for reference in running:
            ray.cancel(reference)
        ray.kill(counter)
    return [results[number] for number in sorted(results)]
