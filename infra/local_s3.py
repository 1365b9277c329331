"""The embedded S3 server: SeaweedFS' `weed mini`, all of it in one process on this machine."""

from infra.process import Program
from infra.service import BUCKET, Service, State, http_problem, program_path
from infra.site import service_environment
from shards.store import S3Access, ensure_bucket

_PORTS = (
    "s3",
    "s3_grpc",
    "master",
    "master_grpc",
    "volume",
    "volume_grpc",
    "filer",
    "filer_grpc",
    "admin",
    "admin_grpc",
)


def s3_access(state: State) -> S3Access:
    """How to reach the server."""
    access_key, secret_key = state.keys()
    return S3Access(endpoint_url=_address(state), access_key=access_key, secret_key=secret_key)


def _address(state: State) -> str:
    return f"http://127.0.0.1:{state.port('s3', 's3')}"


def _program(state: State) -> Program:
    folder = state.folder / "s3"
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = state.keys()
    ports = {name: str(state.port("s3", name)) for name in _PORTS}
    command = (
        program_path("weed"),
        f"-logdir={logs}",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-disableHttp",  # the filer's own HTTP port asks for no key
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.max=1000",
        "-volume.preStopSeconds=0",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={ports['s3_grpc']}",
        f"-master.port={ports['master']}",
        f"-master.port.grpc={ports['master_grpc']}",
        f"-volume.port={ports['volume']}",
        f"-volume.port.grpc={ports['volume_grpc']}",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={ports['filer_grpc']}",
        f"-admin.port={ports['admin']}",
        f"-admin.port.grpc={ports['admin_grpc']}",
    )
    environment = service_environment() | {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "GOMEMLIMIT": "768MiB",
        "WEED_FILER_OPTIONS_S3_EMPTY_FOLDER_CLEANUP_DELAY": "1s",
    }
    return Program(command=command, environment=environment, folder=folder, lock=folder / "lock")


def _problem(state: State) -> str | None:
    # In this order: while the volume server still starts, the S3 port answers, and fails to read what it has.
    return http_problem(state.port("s3", "volume"), "/healthz") or http_problem(state.port("s3", "s3"), "/healthz")


def _finish(state: State) -> None:
    ensure_bucket(s3_access(state), BUCKET)


S3 = Service(
    name="s3",
    ports=_PORTS,
    program=_program,
    problem=_problem,
    address=_address,
    finish=_finish,
    start_s=60,
    grace_s=10,
)
