"""The embedded Ray cluster: one head node on this machine, with token authentication, on loopback only."""

import hashlib
import os
import secrets
import shutil
import sys
from pathlib import Path

from infra.process import Program
from infra.service import Service, State, http_problem, program_path, write_private
from infra.site import SiteError, ray_settings, service_environment

_OBJECT_STORE_BYTES = 1_000_000_000
# Ray's own limits are for machines with nothing else to do; ours, `start_s`, is the one that counts.
PATIENCE = {
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "150",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "120",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is no other node to which work could move
}
_PORTS = (
    "gcs",
    "object_manager",
    "node_manager",
    "client",
    "dashboard",
    "agent",
    "agent_grpc",
    "runtime_env",
    "metrics",
    "autoscaler_metrics",
    "dashboard_metrics",
)


def ray_address(state: State) -> str:
    """`HOST:PORT` for `ray.init`."""
    return f"127.0.0.1:{state.port('ray', 'gcs')}"


def ray_dashboard(state: State) -> str:
    """Where jobs are submitted."""
    return f"http://127.0.0.1:{state.port('ray', 'dashboard')}"


def session_folder(state: Path) -> Path:
    """Where Ray keeps its sockets and logs: a short path, since a socket's name is limited to some 100 bytes."""
    return Path("/tmp") / f"tavlad-{os.getuid()}-{hashlib.sha256(os.fsencode(state)).hexdigest()[:8]}"  # noqa: S108


def _program(state: State) -> Program:
    settings = ray_settings(state.folder)
    token = Path(settings["RAY_AUTH_TOKEN_PATH"])
    if not token.exists():
        write_private(token, secrets.token_hex(32))
    ports = {name: str(state.port("ray", name)) for name in _PORTS}
    command = (
        program_path("ray"),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={ports['gcs']}",
        f"--object-manager-port={ports['object_manager']}",
        f"--node-manager-port={ports['node_manager']}",
        f"--ray-client-server-port={ports['client']}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports['dashboard']}",
        f"--dashboard-agent-listen-port={ports['agent']}",
        f"--dashboard-agent-grpc-port={ports['agent_grpc']}",
        f"--runtime-env-agent-port={ports['runtime_env']}",
        f"--metrics-export-port={ports['metrics']}",
        "--min-worker-port=0",  # any free ports: Ray's default range is the same for every cluster of a machine
        "--max-worker-port=0",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={_clean_session_folder(state.folder)}",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
    )
    environment = service_environment() | settings | PATIENCE
    environment |= {
        "AUTOSCALER_METRIC_PORT": ports["autoscaler_metrics"],
        "DASHBOARD_METRIC_PORT": ports["dashboard_metrics"],
        "TAVLAD_HOME": str(state.folder),  # so that `load_site("local")` works in every worker
        # So that a submitted job's `python` is this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]),
    }
    return Program(command=command, environment=environment, folder=state.folder)


def _problem(state: State) -> str | None:
    token = Path(ray_settings(state.folder)["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    return http_problem(state.port("ray", "dashboard"), "/api/gcs_healthz", headers) or http_problem(
        state.port("ray", "agent"), "/api/local_raylet_healthz", headers
    )


def _clean_session_folder(state: Path) -> Path:
    """The session folder, ours alone, with nothing in it but the latest session's logs."""
    folder = session_folder(state)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid():
        raise SiteError(f"{folder} belongs to another user: remove it, or set TAVLAD_HOME to another folder")
    folder.chmod(0o700)
    for old in sorted(folder.glob("session_2*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


RAY = Service(
    name="ray",
    ports=_PORTS,
    program=_program,
    problem=_problem,
    address=ray_dashboard,
    start_s=180,
    grace_s=20,
)
