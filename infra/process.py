"""Starts, finds and ends the processes of an embedded service, all of them and no others.

Every process of a service carries a mark in its environment, inherited by all its descendants: the state folder and the
service's name. So a recycled process id is never mistaken for ours, and nothing of ours is forgotten, even if a part of
the service was killed, ran away into a session of its own, or was started just before this program died.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra import launch
from infra.site import SiteError

_MARK = "TAVLAD_SERVICE"
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What to run for a service."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    """Its working folder; must exist."""
    lock: Path | None = None
    """A file it holds locked while it lives, so that no second one works on the same data."""


def start(program: Program, mark: str, log: Path) -> int:
    """Starts the program as a daemon marked `mark`; returns its process id."""
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    launcher = [sys.executable, "-I", "-S", launch.__file__, str(log), str(program.lock or ""), *program.command]
    environment = {**program.environment, _MARK: mark}
    done = subprocess.run(
        launcher, check=False, capture_output=True, text=True, env=environment, cwd=program.folder, timeout=60
    )
    if done.returncode == launch.LOCKED:
        raise SiteError(f"{program.lock} is locked: another process works on {program.folder}; end it, then try again")
    if done.returncode != 0:
        raise SiteError(f"{program.command[0]} could not be started: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def is_running(pid: int, mark: str) -> bool:
    """Whether the process lives and is marked `mark`."""
    try:
        process = psutil.Process(pid)
        return not _has_ended(process) and process.environ().get(_MARK) == mark
    except (*_GONE, psutil.AccessDenied):
        return False


def age_s(pid: int) -> float:
    """Seconds since the process was started; 0 if it is gone."""
    try:
        return max(0.0, time.time() - psutil.Process(pid).create_time())
    except _GONE:
        return 0.0


def members(mark: str) -> list[psutil.Process]:
    """All living processes of the service.

    Those whose environment carries the mark, and those in a session with one of them: a program that renames itself may
    overwrite its own environment, and nobody can enter a session from outside.
    """
    session_of: dict[psutil.Process, int] = {}
    marked: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if _has_ended(process):
                continue
            session_of[process] = os.getsid(process.pid)
            if process.environ().get(_MARK) == mark:
                marked.add(process)
        except (*_GONE, psutil.AccessDenied):
            continue
    sessions = {session_of[process] for process in marked}
    return [process for process, session in session_of.items() if session in sessions]


def end(mark: str, pid: int | None, grace_s: float) -> None:
    """Ends all processes of the service: its first one is asked to stop, then the rest, then they are killed."""
    ours = set(members(mark))
    first = {process for process in ours if process.pid == pid}
    for asked, patience_s in ((first, grace_s), (ours, 3.0)):
        for process in asked:
            with contextlib.suppress(*_GONE):
                process.terminate()
                process.resume()  # one that was suspended would not hear it
        # A first process that stops in good order ends the others itself.
        _wait(asked, patience_s)
        ours |= set(members(mark))
    deadline = time.monotonic() + 20
    while alive := _alive(ours | set(members(mark))):
        if time.monotonic() > deadline:
            raise SiteError(f"processes {[process.pid for process in alive]} do not end, not even when killed")
        for process in alive:
            with contextlib.suppress(*_GONE):
                process.kill()
        _wait(alive, 1.0)


def _wait(processes: Iterable[psutil.Process], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while _alive(processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    alive: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(*_GONE):
            if process.is_running() and not _has_ended(process):
                alive.append(process)
    return alive


def _has_ended(process: psutil.Process) -> bool:
    """Whether nothing is left of it but an entry which its parent, or a container without an init, does not remove.

    While other threads of a killed process still end, it looks the same, and has its ports and locks still.
    """
    return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
