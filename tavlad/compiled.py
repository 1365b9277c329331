"""`training.compile`: torch.compile for what it makes quicker, tried before it is relied on."""

from collections.abc import Callable
from typing import Any

import torch

from tavlad.errors import UserError


def compiled(function: Callable[..., Any], *, graphs: bool) -> Callable[..., Any]:
    """The function, compiled at its first call for that call's shapes; at another size once more, for any size.

    `graphs`: on a GPU its kernels are recorded as one CUDA graph for each size, and launched as one.
    """
    return torch.compile(function, mode="reduce-overhead" if graphs else None)


def require_compiler(device: torch.device) -> None:
    """ValueError where torch.compile does not work: it needs a C++ compiler, and on a GPU Triton."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        torch.compile(probe)(torch.zeros(8, device=device))
    except Exception as error:
        needed = "a C++ compiler such as g++" if device.type == "cpu" else "a C++ compiler such as g++, and Triton"
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"training.compile = true: torch.compile does not work here ({why}): install {needed}, or set "
            "training.compile = false"
        ) from error
