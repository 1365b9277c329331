"""float32 that is float32. PyTorch's default on a GPU is TF32 for float32 convolutions and GRUs, whose products have 10
bits of mantissa instead of 23: errors of 1e-3, and with the sharp assignment other actions for some clips."""

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_cudnn: Any = torch.backends.cudnn
_BACKENDS: tuple[Any, ...] = (_cudnn.conv, _cudnn.rnn, torch.backends.cuda.matmul)


class _Settings:
    """The settings are the process's, not the thread's: the first to come in sets them, the last to leave restores."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.num_inside = 0
        self.before: list[str] = []


_settings = _Settings()


@contextmanager
def exact_float32() -> Generator[None]:
    """No TF32 inside, and none for threads beside. What is in bf16 or float16 stays so."""
    with _settings.lock:
        if not _settings.num_inside:
            _settings.before = [backend.fp32_precision for backend in _BACKENDS]
            for backend in _BACKENDS:
                backend.fp32_precision = "ieee"
        _settings.num_inside += 1
    try:
        yield
    finally:
        with _settings.lock:
            _settings.num_inside -= 1
            if not _settings.num_inside:
                for backend, before in zip(_BACKENDS, _settings.before, strict=True):
                    backend.fp32_precision = before
