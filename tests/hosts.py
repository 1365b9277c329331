"""Several hosts on one machine, for what one host cannot show: each with its own network, processes, /proc, host name,
/tmp/ray and /tmp/tavlad, joined by a cable each to one switch.

A host is a set of Linux namespaces around a first process. They end with that process, and it ends when whoever made
the host lets go of its stdin, be it by dying: nothing is left, whatever happens. Nothing of the machine's own network
is touched or reachable, so servers in here are open to nobody else. Needs root, iproute2 and util-linux.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

_SUBNET = "10.77.0"
_PRIVATE = ("/tmp/ray", "/tmp/tavlad")
_INIT = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the first process buries whoever has lost a parent
sys.stdout.write("\\n")
sys.stdout.flush()
sys.stdin.buffer.read()
"""


def why_not() -> str | None:
    """None if hosts can be made here, else one sentence that says what is missing."""
    if os.geteuid() != 0:
        return "several hosts need root: network namespaces are made for them"
    missing = [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"several hosts need {' and '.join(missing)} (packages iproute2 and util-linux)"
    command = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "true"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return "several hosts need namespaces, which this machine (a container without privileges?) does not allow"
    return None


class Host:
    """One of them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        """Its own disk: what it has in /tmp/ray and /tmp/tavlad lies here."""
        for private in _PRIVATE:
            Path(private).mkdir(exist_ok=True)  # a place to mount on
            (folder / Path(private).name).mkdir(parents=True, exist_ok=True)
        unshare = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            [*unshare, sys.executable, "-I", "-S", "-c", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._started: list[subprocess.Popen[bytes]] = []
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"\n", f"host {name} does not start"
        self._process.stdout.close()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self.pid = int(children.split()[0])
        """Its first process, as the machine counts."""
        setup = [f"hostname {name}", "ip link set lo up"]
        setup += [f"mount --bind {folder / Path(private).name} {private}" for private in _PRIVATE]
        self.run("sh", "-ec", "; ".join(setup))

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command in here, until it ends. An exit code that is not 0 is an error that shows what it said."""
        done = self.try_(*command, environment=environment, timeout_s=timeout_s)
        assert done.returncode == 0, f"{self.name}: {command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def try_(
        self, *command: str, environment: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        """As `run`, whatever the exit code."""
        return subprocess.run(
            self._entered(command),
            env=environment if environment is None else dict(environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, log: Path
    ) -> "subprocess.Popen[bytes]":
        """Starts a command in here that goes on, until the host ends at the latest; its output goes to `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self._entered(command),
                env=environment if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def kill(self) -> None:
        """kill -9 of everything in here at once; the host is gone and the kernel ends its connections."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """The same by way of its first process's stdin."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for process in (self._process, *self._started):
            process.wait(timeout=30)

    def _entered(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--uts", "--", *command]


class Lan:
    """Hosts and the switch that joins them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hosts: dict[str, Host] = {}
        self._addresses: dict[str, str] = {}
        self._number = 0
        self._switch = Host("switch", folder / "switch")
        self._plug("add", "bridge", "type", "bridge")
        self._plug("set", "bridge", "up")

    def add(self, name: str) -> Host:
        """A new host with an address of its own; a name that was there before is a new machine in its place."""
        if name in self._hosts:
            self._unplug(name)
        self._number += 1
        number = self._number
        host = Host(name, self._folder / f"{name}-{number}")
        self._hosts[name] = host
        self._addresses[name] = f"{_SUBNET}.{number}"
        self._plug("add", f"to-{name}", "type", "veth", "peer", "name", "lan0", "netns", str(host.pid))
        self._plug("set", f"to-{name}", "master", "bridge", "up")
        host.run("ip", "address", "add", f"{self._addresses[name]}/24", "dev", "lan0")
        host.run("ip", "link", "set", "lan0", "up")
        return host

    def address(self, host: Host) -> str:
        """Where the others reach it."""
        return self._addresses[host.name]

    def cut(self, host: Host) -> None:
        """Pulls the host's cable: nobody is told of it, packets just end."""
        self._plug("set", f"to-{host.name}", "down")

    def restore(self, host: Host) -> None:
        """Puts the cable back."""
        self._plug("set", f"to-{host.name}", "up")

    def power_off(self, host: Host) -> None:
        """As a machine dies: its cable first, so that no peer hears a connection end, then all that ran there."""
        self.cut(host)
        host.kill()

    def end(self) -> None:
        """All of it."""
        for host in [*self._hosts.values(), self._switch]:
            host.end()

    def _unplug(self, name: str) -> None:
        """Takes the cable of a host that has ended; it would stay for as long as connections wait for an answer."""
        unplug = ["nsenter", f"--target={self._switch.pid}", "--net", "ip", "link", "delete", f"to-{name}"]
        subprocess.run(unplug, check=False, capture_output=True)  # the kernel may have taken it already

    def _plug(self, *words: str) -> None:
        """`ip link` on the switch, with process ids as the machine counts them."""
        subprocess.run(["nsenter", f"--target={self._switch.pid}", "--net", "ip", "link", *words], check=True)


@contextlib.contextmanager
def lan(folder: Path) -> Generator[Lan]:
    """A switch to plug hosts into, whose disks lie in `folder`; ended with the block, or with this process."""
    made = Lan(folder)
    try:
        yield made
    finally:
        made.end()
