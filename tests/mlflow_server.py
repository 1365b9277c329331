"""A real MLflow server for tests: sqlite, artifacts through the server, loopback, its own port."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.ports import free_port

# Ends the server's processes when its standard input ends: when told to, and when pytest is killed.
_ENDER = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


class MlflowServer:
    """A server process that a test may stop, freeze and start again over the same data."""

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        self._folder = folder
        self.artifacts = folder / "artifacts"
        """Where it keeps artifacts, by experiment."""
        self._process: subprocess.Popen[bytes] | None = None
        self._ender: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--serve-artifacts", "--artifacts-destination", str(self.artifacts)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self._folder
            )
        watch = [sys.executable, "-I", "-S", "-c", _ENDER, str(self._process.pid)]
        self._ender = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        for _ in range(600):
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise AssertionError((self._folder / "server.log").read_text())

    def stop(self) -> None:
        """End the server's processes at once, as a crash would."""
        assert self._process is not None
        assert self._ender is not None
        self._ender.communicate()
        self._process.wait()

    def freeze(self) -> None:
        """Let the server accept connections and answer none."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server answer again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)


_shared: list[MlflowServer] = []


@pytest.fixture(scope="session")
def mlflow_server(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> MlflowServer:
    """A running MLflow server, one for the tests of all rooms: each uses names of its own."""
    if not _shared:
        server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
        server.start()
        pytestconfig.add_cleanup(server.stop)
        _shared.append(server)
    return _shared[0]
