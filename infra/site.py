"""A site: where Ray, S3 and MLflow answer. The only file that reads or writes environment variables.

`local` is the embedded site of infra/local.py, found through its state folder (TAVLAD_HOME, else ./.tavlad). Any other
site is a TOML file, infra/sites/NAME.toml or a path; TAVLAD_* variables override its values and may carry the S3 keys.
TAVLAD_SITE is the site of verbs without --site, TAVLAD_CACHE a node's folder for packed clips.
"""

import difflib
import json
import os
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from infra.s3_keys import ENVIRONMENT, find_keys
from shards.store import S3Access, split_s3_uri
from tavlad.errors import UserError

_KEYS = {  # key of a site file -> variable that overrides it
    "ray_address": "TAVLAD_RAY_ADDRESS",
    "ray_dashboard": "TAVLAD_RAY_DASHBOARD",
    "s3_endpoint": "TAVLAD_S3_ENDPOINT",
    "s3_region": "TAVLAD_S3_REGION",
    "bucket": "TAVLAD_BUCKET",
    "mlflow": "TAVLAD_MLFLOW",
    "s3_keys": "TAVLAD_S3_KEYS",
}
_OPTIONAL = {"s3_endpoint": "", "s3_region": "us-east-1", "s3_keys": ENVIRONMENT}
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's, in the entrypoint of a submitted job
_THREADS = {
    # All threads of a worker take memory from one heap. Ray trains in a thread, whose own heap would give large pieces
    # back to the kernel at once: 30,000 page faults a step (docs/LOG.md, 2026-11-26). glibc reads it as it starts.
    "MALLOC_ARENA_MAX": "1",
    # torch's threads sleep where they wait for each other. Spinning, they take the processor from whom they wait for:
    # beside other work a forward pass took nine times as long (docs/LOG.md, 2026-11-25).
    "OMP_WAIT_POLICY": "PASSIVE",
}
_MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is the verb's
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # what cannot be told waits in the spool
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # seconds; uploads need them
    "MLFLOW_UV_AUTO_DETECT": "false",  # or a uv project's files in the working folder would join the model
}
# Ray turns 127.0.0.1 into the machine's outer address, and then listens on all interfaces, unless it takes itself to be
# on a system without clusters. The name is Ray's; the variable works, and is needed, on Linux.
_RAY_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_LOOPBACK = "127.0.0.1,localhost"


class SiteError(UserError):
    """The site is not described well enough, or a service of it does not run; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Addresses of the three servers a run needs, and where in the bucket things live."""

    name: str
    ray_address: str
    """`HOST:PORT` for `ray.init`."""
    ray_dashboard: str
    """`http://HOST:PORT`, where jobs are submitted."""
    s3: S3Access
    bucket: str
    mlflow_uri: str
    s3_keys: str = ENVIRONMENT
    """Where the S3 keys come from: "environment", "role", or the path of a private file; see infra/s3_keys.py."""
    state: Path | None = None
    """Folder of the embedded site; None for all others."""

    def dataset_uri(self, name: str) -> str:
        """Where the shard set `name` lives."""
        return f"s3://{self.bucket}/datasets/{name}"

    @property
    def runs_uri(self) -> str:
        """Where Ray Train keeps checkpoints."""
        return f"s3://{self.bucket}/runs"

    @property
    def sweeps_uri(self) -> str:
        """Where sweeps keep their trials."""
        return f"s3://{self.bucket}/sweeps"

    @property
    def codebooks_uri(self) -> str:
        """Where k-means centres are kept."""
        return f"s3://{self.bucket}/codebooks"

    @property
    def features_uri(self) -> str:
        """Where feature sets are kept."""
        return f"s3://{self.bucket}/features"

    def worker_environment(self) -> dict[str, str]:
        """What a Ray worker needs in its environment so that `load_site(self.name)` gives this site there.

        No secret is in it, since Ray's dashboard shows it: for `local` the keys are read from the state folder, and the
        nodes of another site have its S3 keys in their own environment.
        """
        threads = {name: os.environ.get(name, value) for name, value in _THREADS.items()}
        if self.state is not None:
            cache = os.environ.get("TAVLAD_CACHE")
            return threads | {"TAVLAD_HOME": str(self.state)} | ({"TAVLAD_CACHE": cache} if cache else {})
        return threads | {
            "TAVLAD_RAY_ADDRESS": self.ray_address,
            "TAVLAD_RAY_DASHBOARD": self.ray_dashboard,
            "TAVLAD_S3_ENDPOINT": self.s3.endpoint_url or "",
            "TAVLAD_S3_REGION": self.s3.region,
            "TAVLAD_BUCKET": self.bucket,
            "TAVLAD_MLFLOW": self.mlflow_uri,
            "TAVLAD_S3_KEYS": self.s3_keys,
        }

    def ray_environment(self) -> dict[str, str]:
        """What Ray's programs and `ray.init` need to reach this site's cluster. Contains no secret."""
        addresses = {"RAY_ADDRESS": self.ray_address, "RAY_API_SERVER_ADDRESS": self.ray_dashboard}
        if self.ray_address == "auto":
            del addresses["RAY_ADDRESS"]  # Ray has set it in a submitted job
        return addresses | (ray_settings(self.state) if self.state is not None else {})


def load_site(name: str = "local", *, keys: bool = True) -> Site:
    """The site of that name: `local`, a file of infra/sites, or a path that ends in .toml. Raises `SiteError`.

    With `keys` off the S3 keys are left out: who only submits jobs needs none.
    """
    return _load_local() if name == "local" else _load_toml(name, keys)


def default_site() -> str:
    """The site of a verb that names none: TAVLAD_SITE, else the embedded one."""
    return os.environ.get("TAVLAD_SITE") or "local"


def is_in_job() -> bool:
    """Whether this process is the entrypoint of a submitted Ray job."""
    return _JOB in os.environ


def job_variables() -> set[str]:
    """Names of the variables that a submitted job's runtime environment sets, here and in every worker of the job."""
    job = json.loads(os.environ.get(_JOB) or "{}")
    return set((job.get("runtime_env") or {}).get("env_vars") or {})


def activate(site: Site) -> None:
    """Sets this process's environment so that ray and mlflow find the site; call it before they are imported."""
    if site.state is not None:
        # Ray reads this one when it is imported.
        assert "ray" not in sys.modules or os.environ.get(_RAY_ON_LOOPBACK) == "0", "activate before importing ray"
        os.environ["TAVLAD_HOME"] = str(site.state)
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would win over the token file
    os.environ.update(site.ray_environment())
    os.environ["MLFLOW_TRACKING_URI"] = site.mlflow_uri
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # a sweep's results are ours, not files of Ray Tune's
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # and so is what is shown of it
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead worker is seen sooner than after 2 s
    for name, value in (_MLFLOW | _THREADS).items():
        os.environ.setdefault(name, value)
    os.environ.update(_without_proxy(os.environ))


def state_folder() -> Path:
    """The embedded site's folder: TAVLAD_HOME, else .tavlad in the current folder; absolute."""
    return Path(os.environ.get("TAVLAD_HOME") or ".tavlad").expanduser().resolve()


def cache_folder(site: Site) -> Path:
    """Where a node of the site keeps packed clips: TAVLAD_CACHE of that node, else below the embedded site's state
    folder, else a folder of this user below the system's temporary one."""
    if os.environ.get("TAVLAD_CACHE"):
        return Path(os.environ["TAVLAD_CACHE"]).expanduser().absolute()
    if site.state is not None:
        return site.state / "cache"
    return Path(tempfile.gettempdir()) / f"tavlad-cache-{os.getuid()}"


def site_file(state: Path) -> Path:
    """Where `tavlad up` writes the embedded site's addresses and keys (mode 0600)."""
    return state / "site.json"


def ray_settings(state: Path) -> dict[str, str]:
    """The variables that the embedded Ray cluster and all that talk to it must share."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state / "ray_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        _RAY_ON_LOOPBACK: "0",
    }


def service_environment() -> dict[str, str]:
    """The environment for embedded services: this process's, without settings that are meant for other servers."""
    foreign = ("AWS_", "RAY_", "MLFLOW_", "WEED_", "TAVLAD_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | _without_proxy(kept)


def _without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Servers on this machine are never asked for through a proxy."""
    known = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = known if _LOOPBACK in known else ",".join(filter(None, [known, _LOOPBACK]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _load_local() -> Site:
    state = state_folder()
    try:
        values = json.loads(site_file(state).read_text())
        s3 = S3Access(
            endpoint_url=values["s3_endpoint"], access_key=values["access_key"], secret_key=values["secret_key"]
        )
        return Site(
            name="local",
            ray_address=values["ray_address"],
            ray_dashboard=values["ray_dashboard"],
            s3=s3,
            bucket=values["bucket"],
            mlflow_uri=values["mlflow"],
            state=state,
        )
    except FileNotFoundError as error:
        message = f"no local services were started in {state}: run `tavlad up`, or set TAVLAD_HOME to their folder"
        raise SiteError(message) from error
    except PermissionError as error:
        raise SiteError(
            f"{site_file(state)} belongs to another user: set TAVLAD_HOME to a folder of your own"
        ) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise SiteError(f"{site_file(state)} was written by another version: run `tavlad up` again") from error


def _load_toml(name: str, keys: bool) -> Site:
    file = Path(name) if name.endswith(".toml") else Path(__file__).parent / "sites" / f"{name}.toml"
    overrides = {key: os.environ[variable] for key, variable in _KEYS.items() if variable in os.environ}
    described = set(_KEYS) - set(_OPTIONAL) <= set(overrides)  # in a worker, which may not have the file
    values = _OPTIONAL | ({} if described and not file.is_file() else _read_toml(file, name)) | overrides
    for key in _KEYS:
        if key not in values:
            raise SiteError(f"site {name!r} lacks {key!r}: add it to {file}, or set {_KEYS[key]}")
    _check_addresses(name, values)
    access_key, secret_key = _find_keys(name, values["s3_keys"]) if keys else ("", "")
    return Site(
        name=name,
        ray_address=values["ray_address"],
        ray_dashboard=values["ray_dashboard"].rstrip("/"),
        s3=S3Access(
            endpoint_url=values["s3_endpoint"].rstrip("/") or None,
            access_key=access_key,
            secret_key=secret_key,
            region=values["s3_region"],
        ),
        bucket=values["bucket"],
        mlflow_uri=values["mlflow"].rstrip("/"),
        s3_keys=values["s3_keys"],
    )


def _read_toml(file: Path, name: str) -> dict[str, str]:
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        known = ["local", *sorted(path.stem for path in (Path(__file__).parent / "sites").glob("*.toml"))]
        message = f"there is no site {name!r} ({file} does not exist): give one of {', '.join(known)}, or a .toml file"
        raise SiteError(message) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SiteError(f"{file} is not a TOML file: {error}") from error
    for key, value in values.items():
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise SiteError(f"{file} has an unknown key {key!r}: the nearest known key is {nearest!r}")
        if not isinstance(value, str):
            raise SiteError(f"{key} in {file} is {value!r}: it must be a string")
    return values


def _check_addresses(name: str, values: Mapping[str, str]) -> None:
    for key in ("ray_dashboard", "s3_endpoint", "mlflow"):
        if values[key] and not values[key].startswith(("http://", "https://")):
            raise SiteError(f"{key} of site {name!r} is {values[key]!r}: it must start with http:// or https://")
        try:
            _ = urlsplit(values[key]).port
        except ValueError as error:
            raise SiteError(f"{key} of site {name!r} is {values[key]!r}: that is no address ({error})") from error
    if not values["ray_address"]:
        raise SiteError(f"ray_address of site {name!r} is empty: give HOST:PORT, or auto inside the cluster")
    try:
        split_s3_uri(f"s3://{values['bucket']}")
    except UserError as error:
        raise SiteError(f"bucket of site {name!r} is {values['bucket']!r}: that is no bucket name") from error


def _find_keys(name: str, source: str) -> tuple[str, str]:
    try:
        return find_keys(name, source, os.environ)
    except UserError as error:
        raise SiteError(str(error)) from error
