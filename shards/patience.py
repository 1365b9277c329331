"""Outlasting a store that does not answer for a while, such as a server that is started again."""

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

from shards.store import StoreUnreachable

_OUTAGE_S = 300.0
_LONGEST_PAUSE_S = 10.0

Result = TypeVar("Result")


def outlast(
    operation: Callable[[], Result],
    seconds: float = _OUTAGE_S,
    told: Callable[[str], object] = lambda note: None,
) -> Result:
    """What the operation returns, which is repeated until the store answers, for so many seconds at most.

    The operation must be one that may be done twice. `told` hears once that there is something to wait for, and an
    empty text when it is over. Errors other than `StoreUnreachable` are raised at once.
    """
    deadline, pause = monotonic() + seconds, 0.5
    waited = False
    while True:
        try:
            result = operation()
        except StoreUnreachable:
            if monotonic() + pause > deadline:
                raise
            if not waited:
                told("waiting for the store, which does not answer")
            waited = True
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            if waited:
                told("")
            return result
