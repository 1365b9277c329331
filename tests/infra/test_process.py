"""Processes of a service are found by their mark and ended, all of them and no others."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from infra import process
from infra.process import Program
from infra.site import SiteError

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def mark() -> Generator[str]:
    """A mark of this test's own; whatever still carries it is killed."""
    mark = f"test:{uuid.uuid4().hex}"
    yield mark
    for left in process.members(mark):
        left.kill()


def start(code: str, mark: str, folder: Path, lock: Path | None = None) -> int:
    program = Program(command=(sys.executable, "-c", code), environment=dict(os.environ), folder=folder, lock=lock)
    return process.start(program, mark, folder / "log.log")


def wait_for(file: Path) -> str:
    for _ in range(400):
        if file.exists() and file.read_text().endswith("\n"):
            return file.read_text().strip()
        time.sleep(0.05)
    raise AssertionError(f"{file} did not appear")


def test_a_daemon_outlives_the_process_that_started_it(mark: str, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from infra import process\n"
        f"program = process.Program(command=(sys.executable, '-c', {SLEEP!r}), environment=dict(os.environ),"
        f" folder=Path({str(tmp_path)!r}))\n"
        f"print(process.start(program, {mark!r}, Path({str(tmp_path / 'log.log')!r})))"
    )
    repository = Path(process.__file__).parents[1]
    # In a session of its own, whose end is the end of a terminal.
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, check=True, start_new_session=True
    )
    pid = int(done.stdout)
    assert process.is_running(pid, mark)
    assert os.getsid(pid) == pid
    process.end(mark, pid, grace_s=5)
    assert not process.is_running(pid, mark)


def test_a_process_without_the_mark_is_not_ours(mark: str) -> None:
    assert not process.is_running(os.getpid(), mark)
    with subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True) as stranger:
        process.end(mark, stranger.pid, grace_s=0.1)  # as if its number had been ours once
        assert stranger.poll() is None
        stranger.kill()


def test_children_that_left_the_session_are_ended_too(mark: str, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(f'{{child.pid}}\\n')\n"
        f"{SLEEP}"
    )
    pid = start(code, mark, tmp_path)
    child = int(wait_for(tmp_path / "child"))
    assert {member.pid for member in process.members(mark)} == {pid, child}
    os.kill(pid, 9)  # what is left is found without its parent
    process.end(mark, pid, grace_s=1)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert process.members(mark) == []


def test_a_process_that_ignores_the_request_is_killed(mark: str, tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').write('yes\\n')\n"
        f"{SLEEP}"
    )
    pid = start(code, mark, tmp_path)
    wait_for(tmp_path / "ready")
    process.end(mark, pid, grace_s=0.2)
    assert process.members(mark) == []


def test_a_process_that_stops_in_good_order_is_given_the_time(mark: str, tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "def stop(*_):\n"
        f"    time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w').write('yes\\n'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').write('yes\\n')\n"
        f"{SLEEP}"
    )
    pid = start(code, mark, tmp_path)
    wait_for(tmp_path / "ready")
    process.end(mark, pid, grace_s=20)
    assert (tmp_path / "saved").exists()


def test_a_lock_is_held_as_long_as_the_program_lives(mark: str, tmp_path: Path) -> None:
    pid = start(SLEEP, mark, tmp_path, lock=tmp_path / "lock")
    with pytest.raises(SiteError, match="lock is locked: another process works on"):
        start(SLEEP, mark, tmp_path, lock=tmp_path / "lock")
    os.kill(pid, 9)
    process.end(mark, pid, grace_s=1)
    assert process.is_running(start(SLEEP, mark, tmp_path, lock=tmp_path / "lock"), mark)


def test_the_log_before_is_kept(mark: str, tmp_path: Path) -> None:
    for number in range(3):
        start(f"print({number})", mark, tmp_path)
        wait_for(tmp_path / "log.log")
    assert (tmp_path / "log.log").read_text() == "2\n"
    assert (tmp_path / "log.previous.log").read_text() == "1\n"


def test_a_program_that_does_not_exist_is_an_error(mark: str, tmp_path: Path) -> None:
    program = Program(command=("/no/such/program",), environment=dict(os.environ), folder=tmp_path)
    with pytest.raises(SiteError, match=r"/no/such/program could not be started: .*No such file"):
        process.start(program, mark, tmp_path / "log.log")
