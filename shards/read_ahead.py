"""Reading ahead with threads, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], num_threads: int, depth: int) -> Iterator[Read]:
    """`read` of each item, in their order, at most `depth` of them under way or waiting; errors come at their place.

    Threads end with the iteration, however it ends.
    """
    assert num_threads >= 1, num_threads
    assert depth >= 1, depth
    waiting: deque[Future[Read]] = deque()
    with ThreadPoolExecutor(num_threads, "read-ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) >= depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
