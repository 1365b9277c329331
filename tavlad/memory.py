"""Memory of a process that computes on a CPU: what tensors free stays with it, for the next ones."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc use freed memory again, up to a gigabyte a tensor, for the rest of the process; elsewhere does nothing.

    By default it gives large pieces back to the kernel at once and takes fresh ones, and each fresh page costs a fault:
    a tenth to a fifth of a step (docs/LOG.md, 2026-11-26). The process keeps what it needed at most.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST)
    mallopt(_M_TRIM_THRESHOLD, 2 * _MOST - 1)
