"""Ctrl-C and SIGTERM: what `tavlad stop` sends to a job's driver is the same wish as the user's own."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

SECONDS_TO_LEAVE = 60.0
"""How long a training that is stopped may take to its next step's end and for its checkpoint."""
SECONDS_TO_STOP = SECONDS_TO_LEAVE + 60.0
"""After how long Ray kills the driver of a job that it has told to stop; MLflow is to be told as well."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Generator[None]:
    """Both raise KeyboardInterrupt: also where this process inherited that they are ignored."""
    with _handled(_interrupt):
        yield


@contextmanager
def asked_to_stop() -> Generator[threading.Event]:
    """The first one sets the event; the next raises KeyboardInterrupt."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    with _handled(ask):
        yield asked


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handled(handler: Callable[..., None]) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may listen to signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
