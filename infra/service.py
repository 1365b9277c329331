"""What the embedded site knows of each service, and the folder where it remembers what it started."""

import contextlib
import http.client
import json
import os
import random
import secrets
import socket
import sysconfig
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infra.process import Program
from infra.site import SiteError

BUCKET = "tavlad"
_SAVING = threading.Lock()
_FIRST_PORT, _LAST_PORT = 20000, 31999  # above the range of other Ray clusters, below that of outgoing connections


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One of the embedded servers: how it is started, asked whether it is well, and ended."""

    name: str
    ports: tuple[str, ...]
    """Names of all the ports it opens."""
    program: "Callable[[State], Program]"
    problem: "Callable[[State], str | None]"
    """What is wrong with the running server now, or None. Cheap: a few HTTP requests on this machine."""
    address: "Callable[[State], str]"
    finish: "Callable[[State], None]" = lambda state: None
    """Done once after a start, when the server answers."""
    needs: "Callable[[State], str]" = lambda state: ""
    """Addresses its program was given: if they change, it is started again."""
    start_s: float
    """How long it may take to answer after a start on a busy machine."""
    grace_s: float
    """How long it may take to stop in good order."""


@dataclass(kw_only=True, slots=True)
class Started:
    """What is remembered of a service that was started."""

    pid: int | None = None
    ports: dict[str, int] = field(default_factory=dict[str, int])
    needs: str = ""
    is_finished: bool = False
    """Whether what is to be done once after the start was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The state folder: random keys and what was started, in files that only their owner can read."""

    folder: Path
    started: dict[str, Started]

    def port(self, service: str, name: str) -> int:
        return self.started[service].ports[name]

    def mark(self, service: Service) -> str:
        return f"{self.folder}:{service.name}"

    def log(self, service: Service) -> Path:
        return self.folder / "logs" / f"{service.name}.log"

    def keys(self) -> tuple[str, str]:
        """The S3 server's access key and secret key, made at the first call."""
        file = self.folder / "s3_keys.json"
        with _SAVING:  # the services start together, and must all be given the same keys
            if not file.exists():
                write_private(file, json.dumps([f"tavlad{secrets.token_hex(8)}", secrets.token_urlsafe(32)]))
        access_key, secret_key = json.loads(file.read_text())
        return access_key, secret_key

    def save(self) -> None:
        with _SAVING:
            write_private(self._file, json.dumps({name: asdict(started) for name, started in self.started.items()}))

    def load(self) -> None:
        """Reads what earlier processes remembered. A file of another version is as good as none: marks are enough."""
        if self._file.exists():
            with contextlib.suppress(ValueError, TypeError):
                remembered = json.loads(self._file.read_text())
                self.started.update({name: Started(**values) for name, values in remembered.items()})

    @property
    def _file(self) -> Path:
        return self.folder / "services.json"


def write_private(file: Path, text: str) -> None:
    """Writes a file with mode 0600, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def choose_ports(service: Service, state: State) -> dict[str, int]:
    """The ports the service had before, or others where somebody else has taken one since."""
    remembered = state.started[service.name].ports
    if set(remembered) == set(service.ports) and all(_is_free(port) for port in remembered.values()):
        return remembered
    taken = {port for started in state.started.values() for port in started.ports.values()}
    chosen: dict[str, int] = {}
    for port in random.sample(range(_FIRST_PORT, _LAST_PORT + 1), 2000):
        if len(chosen) == len(service.ports):
            return chosen
        if port not in taken and _is_free(port):
            chosen[service.ports[len(chosen)]] = port
    raise SiteError(f"no free ports between {_FIRST_PORT} and {_LAST_PORT} for {service.name}: end what occupies them")


def program_path(name: str) -> str:
    """A program that was installed together with this one."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise SiteError(f"{path} does not exist: install this project with its dependencies again (`make install`)")
    return str(path)


def http_problem(port: int, path: str, headers: Mapping[str, str] | None = None) -> str | None:
    """None if the server on this machine answers 200, else one clause that says what it does instead."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"port {port} does not answer {path} ({error})"
    finally:
        connection.close()
    return None if status == http.HTTPStatus.OK else f"port {port} answers {path} with HTTP status {status}"


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not count, listeners do
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
