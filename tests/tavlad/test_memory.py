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
if sys.argv[2] == "thread":
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
else:
    count()
"""


def _faults(how: str, where: str) -> int:
    done = subprocess.run([sys.executable, "-c", _COUNT, how, where], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose settings these are")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_used_again_without_page_faults(where: str) -> None:
    assert _faults("kept", where) < 100 < _faults("given back", where) / 10
