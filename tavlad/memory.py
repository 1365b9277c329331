"""Memory of a process that computes on a CPU: what tensors free stays with it, for the next ones."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
_MOST = 1 << 30


def keep_freed_memory(device: torch.device) -> None:
    """For a process that computes on a CPU: let glibc use freed memory again, up to a gigabyte a tensor, from now on.
    Elsewhere does nothing.

    By default it gives large pieces back to the kernel at once and takes fresh ones, and each fresh page costs a fault:
    3 to 18 % of what was timed (docs/LOG.md, 2026-11-26). The process keeps what it needed at most. A thread's own heap
    would not keep it: threads that allocate for the first time after this use the process's. For those from before it,
    MALLOC_ARENA_MAX=1 in the environment does the same.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST)
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_TRIM_THRESHOLD, 2 * _MOST - 1)
