"""The embedded MLflow server: `mlflow server` with a SQLite file for runs, and artifacts in the embedded S3 server."""

from infra.local_s3 import s3_access
from infra.process import Program
from infra.service import BUCKET, Service, State, http_problem, program_path
from infra.site import service_environment


def _address(state: State) -> str:
    return f"http://127.0.0.1:{state.port('mlflow', 'http')}"


def _needs(state: State) -> str:
    return str(s3_access(state).endpoint_url)


def _program(state: State) -> Program:
    folder = state.folder / "mlflow"
    folder.mkdir(exist_ok=True)
    access = s3_access(state)
    command = (
        program_path("mlflow"),
        "server",
        "--backend-store-uri=sqlite:///mlflow.db",  # in its working folder, whose path may have any characters
        "--serve-artifacts",
        f"--artifacts-destination=s3://{BUCKET}/mlflow",
        "--host=127.0.0.1",
        f"--port={state.port('mlflow', 'http')}",
        "--workers=1",
        "--uvicorn-opts=--no-access-log",
    )
    environment = service_environment() | {
        "AWS_ACCESS_KEY_ID": access.access_key,
        "AWS_SECRET_ACCESS_KEY": access.secret_key,
        "AWS_DEFAULT_REGION": access.region,
        "AWS_CONFIG_FILE": "/dev/null",  # the user's own settings are for other servers
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_S3_ENDPOINT_URL": _needs(state),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves three processes that we have no use for
    }
    return Program(command=command, environment=environment, folder=folder)


def _problem(state: State) -> str | None:
    return http_problem(state.port("mlflow", "http"), "/health")


MLFLOW = Service(
    name="mlflow",
    ports=("http",),
    program=_program,
    problem=_problem,
    address=_address,
    needs=_needs,
    start_s=180,
    grace_s=10,
)
