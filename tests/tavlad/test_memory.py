"""Freed memory is used again; counted in page faults, in a process of its own, as the setting is the process's."""

import platform
import subprocess
import sys

import pytest

_COUNT = """
import resource, sys, threading
import torch
from tavlad.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    torch.ones(25_000_000)  # 100 MB
def count():
    for _ in range(10):  # aligned pieces need a little more than those freed before: a few times the heap grows
        use()
    before = faults()
    for _ in range(5):
        use()
    print(faults() - before)
count()
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


def _faults(how: str) -> list[int]:
    """In the main thread, and in another."""
    done = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, check=True)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose settings these are")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    for kept, given_back in zip(_faults("kept"), _faults("given back"), strict=True):
        assert kept < 100 < given_back / 10
