"""Starts a program as a daemon: `python launch.py LOG LOCK PROGRAM ARGUMENTS...` prints its process id and ends.

Run as a script in a process of its own, so that the caller has no child to reap and may have as many threads as it
likes. The program gets its own session (the end of a terminal does not reach it), an empty stdin and its log as output.
LOCK, if not empty, is a file whose lock the program then holds for as long as it lives, however it ends.
"""

import fcntl
import os
import subprocess
import sys

LOCKED = 75
"""Exit status if another process holds the lock."""


def main() -> int:
    log, lock, *command = sys.argv[1:]
    inherited: list[int] = []
    if lock:
        inherited.append(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            fcntl.flock(inherited[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return LOCKED
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, pass_fds=inherited
    )
    print(child.pid)  # noqa: T201
    child.returncode = 0  # it is meant to outlive us
    return 0


if __name__ == "__main__":
    sys.exit(main())
