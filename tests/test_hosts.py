"""The hosts that other tests rely on: apart, joined, cut, killed, and gone with whoever made them."""

import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.hosts import Lan, lan, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def two(tmp_path: Path) -> Generator[Lan]:
    with lan(tmp_path) as made:
        yield made


def reaches(made: Lan, one: str, other: str) -> bool:
    """Whether a TCP connection to a port nobody listens on is refused by the other host, not lost on the way."""
    program = (
        f"import socket\ntry: socket.create_connection(('{made._addresses[other]}', 9), 1)\n"
        "except ConnectionRefusedError: print('refused')\nexcept OSError: pass"
    )
    return made._hosts[one].run(sys.executable, "-I", "-c", program).stdout == "refused\n"


def test_hosts_are_apart_and_joined_by_a_cable_that_can_be_cut(two: Lan) -> None:
    a, b = two.add("a"), two.add("b")
    assert a.run("hostname").stdout == "a\n"
    a.run("sh", "-c", "echo hello > /tmp/ray/note")
    assert b.try_("cat", "/tmp/ray/note").returncode != 0
    assert not Path("/tmp/ray/note").exists()
    assert (a.folder / "ray" / "note").read_text() == "hello\n"
    assert reaches(two, "a", "b")
    two.cut(b)
    assert not reaches(two, "a", "b")
    two.restore(b)
    assert reaches(two, "a", "b")


def test_powering_off_ends_all_that_ran_there_and_nothing_else(two: Lan, tmp_path: Path) -> None:
    a, b = two.add("a"), two.add("b")
    running = {host.name: host.start("sh", "-c", "sleep 300 & sleep 300", log=tmp_path / "log") for host in (a, b)}
    # A connection that is never closed in good order keeps its end of the cable for minutes.
    listen = f"import socket; s = socket.create_server(('{two.address(a)}', 9)); c = s.accept()[0]; c.recv(1)"
    talk = (
        f"import socket, time; s = socket.create_connection(('{two.address(a)}', 9), 5); print(flush=True); s.recv(1)"
    )
    a.start(sys.executable, "-I", "-c", listen, log=tmp_path / "listen")
    time.sleep(1)
    b.start(sys.executable, "-I", "-c", talk, log=tmp_path / "talk")
    while not (tmp_path / "talk").read_text():
        time.sleep(0.05)
    two.power_off(b)
    running["b"].wait(timeout=5)
    assert running["a"].poll() is None
    again = two.add("b")
    assert two.address(again) == "10.77.0.3"
    assert reaches(two, "a", "b")
    assert "sleep" not in again.run("ps", "-e").stdout


_MAKER = """
import sys, time
from pathlib import Path
from tests.hosts import Lan
made = Lan(Path(sys.argv[1]))
host = made.add("a")
host.start("sleep", "300", log=Path(sys.argv[1]) / "log")
print(host.pid, flush=True)
time.sleep(300)
"""


def test_hosts_end_with_their_maker_even_if_it_is_killed(tmp_path: Path) -> None:
    maker = subprocess.Popen([sys.executable, "-c", _MAKER, str(tmp_path)], stdout=subprocess.PIPE)
    assert maker.stdout is not None
    with maker.stdout:
        pid = int(maker.stdout.readline())
    os.kill(pid, 0)
    maker.kill()
    maker.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
