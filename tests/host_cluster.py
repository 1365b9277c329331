"""A site made of hosts: a desk that submits, a store with the S3 server and MLflow, a Ray head, and workers.

Each is a host of its own (tests/hosts.py). As on real clusters all see one folder of videos, the keys and Ray's token.
"""

import json
import os
import secrets
import subprocess
import sys
import sysconfig
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local_ray import PATIENCE
from tests.hosts import Host, Lan, lan

ROOT = Path(__file__).parents[1]
BUCKET = "tavlad"
_FOREIGN = ("AWS_", "RAY_", "MLFLOW_", "WEED_", "TAVLAD_", "PYTEST_")
_OBJECT_STORE_BYTES = 150_000_000
_START_S = 900.0  # of a server on a machine that is busy with other things
# What a supervisor (systemd, Kubernetes) does: a node that was given up by the others ends, and is started again.
_FOREVER = 'while :; do "$@"; sleep 1; done'


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document it ended with."""
        assert self.code == 0, self.out + self.err
        return json.loads(self.out.splitlines()[-1])


class Cluster:
    """The hosts of a site, and what one does with them."""

    def __init__(self, hosts: Lan, folder: Path) -> None:
        self._hosts, self.folder = hosts, folder
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True)
        self._keys = [f"key{secrets.token_hex(8)}", secrets.token_urlsafe(32)]
        self._private("keys", "\n".join(self._keys) + "\n")
        self._private("ray_token", secrets.token_hex(32))
        self.desk, self.store, self.head = (hosts.add(name) for name in ("desk", "store", "head"))
        self.workers: dict[str, Host] = {}
        store, head = hosts.address(self.store), hosts.address(self.head)
        self.site = folder / "lab.toml"
        self.site.write_text(
            f'ray_address = "{head}:6379"\nray_dashboard = "http://{head}:8265"\n'
            f's3_endpoint = "http://{store}:8333"\nbucket = "{BUCKET}"\nmlflow = "http://{store}:5000"\n'
            f's3_keys = "{folder / "keys"}"\n'
        )

    def up(self) -> None:
        """All servers, and one worker host; each listens on its own host's address."""
        self._start_s3()
        self._start_mlflow()
        self._start_head()
        self.add_worker("worker")

    def add_worker(self, name: str) -> Host:
        """A new host with one CPU joins the cluster; one that had this name before is replaced."""
        host = self._hosts.add(name)
        self.workers[name] = host
        ray = ("ray", "start", "--block", f"--address={self._hosts.address(self.head)}:6379", *self._ray_options(host))
        host.start("sh", "-c", _FOREVER, "-", *ray, environment=self._node(host), log=self._logs / f"{name}.log")
        return host

    def power_off(self, name: str) -> None:
        """A worker host dies without a word."""
        self._hosts.power_off(self.workers.pop(name))

    def kill(self, name: str) -> None:
        """kill -9 of all that a worker host runs, the network being alive."""
        self.workers.pop(name).kill()

    def cut(self, name: str) -> None:
        """Pulls a worker host's cable."""
        self._hosts.cut(self.workers[name])

    def restore(self, name: str) -> None:
        """Puts it back."""
        self._hosts.restore(self.workers[name])

    def tavlad(self, *arguments: str, timeout_s: float = 900) -> Said:
        """`tavlad --json --site LAB ARGUMENTS` at the desk."""
        return self._at_desk("python", *self._verb("--json", *arguments), timeout_s=timeout_s)

    def start(self, *arguments: str, log: Path) -> "subprocess.Popen[bytes]":
        """The same, while other things happen."""
        return self.desk.start("python", *self._verb(*arguments), environment=self._environment(), log=log)

    def plain_job(self, *command: str, timeout_s: float = 900) -> Said:
        """`ray job submit --working-dir . -- COMMAND` at the desk, in a checkout, as docs/DEPLOY.md says."""
        address = f"http://{self._hosts.address(self.head)}:8265"
        submit = ("ray", "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", *command)
        return self._at_desk(*submit, timeout_s=timeout_s)

    def ask(self, *arguments: str, timeout_s: float = 900) -> Any:
        """What `tests/run_objects.py` answers to these words, run on the store's host."""
        said = self._on(
            self.store, "python", "-m", "tests.run_objects", str(self.site), *arguments, timeout_s=timeout_s
        )
        return said.document["answer"]

    def num_nodes(self) -> int:
        """Nodes that Ray's head takes to be alive."""
        return len(self.ask("nodes"))

    def wait_for_nodes(self, number: int) -> None:
        """Until so many are alive."""
        deadline = time.monotonic() + _START_S
        while (alive := self.num_nodes()) != number:
            assert time.monotonic() < deadline, f"{alive} nodes are alive, not {number}; see {self._logs}"
            time.sleep(1)

    def _verb(self, *arguments: str) -> tuple[str, ...]:
        told = [word for word in arguments if word == "--json"]
        return ("-m", "ray_jobs.cli", *told, "--site", str(self.site), *[w for w in arguments if w != "--json"])

    def _at_desk(self, *command: str, timeout_s: float) -> Said:
        return self._on(self.desk, *command, timeout_s=timeout_s)

    def _on(self, host: Host, *command: str, timeout_s: float) -> Said:
        done = host.try_(*command, environment=self._environment(), timeout_s=timeout_s)
        return Said(done.returncode, done.stdout, done.stderr)

    def _environment(self) -> dict[str, str]:
        """Of whoever uses the site: Ray's token, and the programs of this environment."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return kept | {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), kept.get("PATH", os.defpath)]),
            "PYTHONPATH": str(ROOT),
            "no_proxy": "*",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray_token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def _node(self, host: Host) -> dict[str, str]:
        """Of a node of the cluster: also the site, as docs/DEPLOY.md asks for, and a cache of its own."""
        store, head = self._hosts.address(self.store), self._hosts.address(self.head)
        without_our_code = {name: value for name, value in self._environment().items() if name != "PYTHONPATH"}
        return (
            without_our_code
            | PATIENCE
            | {
                "TAVLAD_SITE": "cluster",
                "TAVLAD_RAY_ADDRESS": f"{head}:6379",
                "TAVLAD_RAY_DASHBOARD": f"http://{head}:8265",
                "TAVLAD_S3_ENDPOINT": f"http://{store}:8333",
                "TAVLAD_BUCKET": BUCKET,
                "TAVLAD_MLFLOW": f"http://{store}:5000",
                "TAVLAD_S3_KEYS": str(self.folder / "keys"),
                "TAVLAD_CACHE": "/tmp/tavlad/cache",
            }
        )

    def _private(self, name: str, text: str) -> None:
        file = self.folder / name
        file.touch(mode=0o600)
        file.write_text(text)

    def _start_s3(self) -> None:
        address, data = self._hosts.address(self.store), self.folder / "s3"
        data.mkdir()
        environment = self._environment() | {
            "AWS_ACCESS_KEY_ID": self._keys[0],
            "AWS_SECRET_ACCESS_KEY": self._keys[1],
            "GOMEMLIMIT": "512MiB",
            "WEED_FILER_OPTIONS_S3_EMPTY_FOLDER_CLEANUP_DELAY": "1s",
        }
        others = (
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        )
        weed = ("weed", f"-logdir={data}", "mini", f"-dir={data}", f"-ip={address}", f"-ip.bind={address}")
        self.store.start(
            *(*weed, "-disableHttp", "-volume.max=1000", *others), environment=environment, log=self._logs / "s3.log"
        )
        self.ask("make-bucket", timeout_s=_START_S)

    def _start_mlflow(self) -> None:
        address, folder = self._hosts.address(self.store), self.folder / "mlflow"
        folder.mkdir()
        server = ("mlflow", "server", f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--serve-artifacts")
        environment = self._environment() | {
            "AWS_ACCESS_KEY_ID": self._keys[0],
            "AWS_SECRET_ACCESS_KEY": self._keys[1],
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": f"http://{address}:8333",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        where = (f"--artifacts-destination=s3://{BUCKET}/mlflow", f"--host={address}", "--port=5000", "--workers=1")
        self.store.start(*server, *where, environment=environment, log=self._logs / "mlflow.log")
        self.ask("wait-for", f"http://{address}:5000/health", timeout_s=_START_S)

    def _start_head(self) -> None:
        address = self._hosts.address(self.head)
        ray = ("ray", "start", "--head", "--block", "--port=6379", f"--dashboard-host={address}")
        options = self._ray_options(self.head)
        environment = self._node(self.head)
        self.head.start(*ray, *options, environment=environment, log=self._logs / "head.log")
        self.ask("wait-for", f"http://{address}:8265/api/gcs_healthz", timeout_s=_START_S)

    def _ray_options(self, host: Host) -> tuple[str, ...]:
        return (
            f"--node-ip-address={self._hosts.address(host)}",
            "--num-cpus=1",
            # Named, or the raylet waits 15 s for its agents to write them down, which a busy machine may not manage.
            "--metrics-export-port=8080",
            "--dashboard-agent-listen-port=52365",
            "--dashboard-agent-grpc-port=52366",
            "--runtime-env-agent-port=52367",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
        )


@contextmanager
def cluster(folder: Path) -> Generator[Cluster]:
    """A site of four hosts, up; gone at the end of the block, or with this process. Its logs stay in `folder`."""
    assert sys.prefix != sys.base_prefix, "run it with the project's .venv"
    with lan(folder / "hosts") as hosts:
        made = Cluster(hosts, folder)
        made.up()
        made.wait_for_nodes(2)
        yield made
