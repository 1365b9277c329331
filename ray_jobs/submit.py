"""Verbs as jobs of a cluster: submitted or joined, followed, listed, ended, through Ray's jobs API."""

import asyncio
import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from infra.site import Site
from ray_jobs.console import Console
from ray_jobs.interrupts import SECONDS_TO_STOP
from ray_jobs.job_parcel import Parcel, fill_working_folder
from ray_jobs.provenance import code_tags
from shards.scratch import scratch
from tavlad.errors import UserError

_ATTEMPT = re.compile(r"(tavlad-[a-z]+-[0-9a-f]{12})-(\d+)")
# Each sets its own level when it is imported, whatever its parents' is.
_TELLS_OF_UPLOADS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
# Ray's client tells an answer's status only in its message, where the job's id may hold these digits too.
_NO_SUCH_JOB = re.compile(r"Request failed with status code 404: Job .* does not exist")
_SECONDS_BETWEEN_TRIES = 2.0
_TRIES = 30
_TRIES_TO_STOP = int(1.5 * SECONDS_TO_STOP / _SECONDS_BETWEEN_TRIES)
_TIME_TO_STOP = {"RAY_JOB_STOP_WAIT_TIME_S": f"{SECONDS_TO_STOP:.0f}"}
"""Ray's own 3 s are too few for a checkpoint."""
_FAILED = 1
_DETACHED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How following a job ended."""

    code: int
    """What the verb's own exit code was; 1 if the job died of something else, 130 if we stopped following."""
    document: dict[str, Any] | None
    """The verb's JSON document, if the job was asked for one."""


def jobs_of(site: Site) -> JobSubmissionClient:
    """The cluster's jobs API. Raises ValueError that says whether the address or the token is wrong."""
    for name in _TELLS_OF_UPLOADS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with _errors(site):
        return JobSubmissionClient(site.ray_dashboard)


def submit(site: Site, parcel: Parcel, console: Console, *, json_output: bool = False) -> str:
    """Start the job, or join it if it runs already; returns its id. A job that has ended gets another attempt."""
    client = jobs_of(site)
    with _errors(site), scratch() as folder:
        fill_working_folder(parcel, folder)
        while True:
            attempts = _attempts(client, parcel.name)
            if attempts and not attempts[-1].status.is_terminal():
                job = str(attempts[-1].submission_id)
                console.say(f"{job} runs already: joined")
                return job
            job = f"{parcel.name}-{len(attempts) + 1}"
            try:
                client.submit_job(
                    entrypoint=parcel.command(site.name, json_output),
                    submission_id=job,
                    # No secret is in it: Ray shows it to whoever may see the job.
                    runtime_env={"working_dir": folder, "env_vars": site.worker_environment() | _TIME_TO_STOP},
                    metadata={
                        "verb": parcel.verb,
                        "arguments": " ".join(parcel.arguments),
                        **code_tags((parcel.code,)),
                    },
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                continue  # somebody else was a moment earlier: join theirs
            console.say(f"submitted {job} to {site.ray_dashboard}")
            return job


def follow(site: Site, job: str, console: Console, show: Callable[[str], None]) -> Ended:
    """Show the job's output from its beginning until it ends. Ctrl-C leaves the job alone and says how to come back."""
    client = jobs_of(site)
    try:
        with _errors(site):
            text = _in_background(lambda: asyncio.run(_tail(client, job, show)))
            info = client.get_job_info(job)
    except KeyboardInterrupt:
        console.say(f"\n{job} goes on; `tavlad --site {site.name} logs {job}` follows it, `stop {job}` ends it")
        return Ended(code=_DETACHED, document=None)
    if str(info.status) == "SUCCEEDED":
        return Ended(code=0, document=_document(text))
    code = info.driver_exit_code or _FAILED
    if str(info.status) == "STOPPED":
        console.say(f"{job} was stopped; the same command goes on where it was")
    elif info.driver_exit_code is None or info.driver_exit_code < 0 or "error: " not in text:
        console.say(f"{job} failed: {(info.message or 'no reason is known').strip()}")
    return Ended(code=code if 0 < code < 256 else _FAILED, document=_document(text))


def _in_background(work: Callable[[], str]) -> str:
    """The result of work that Ctrl-C does not wait for: a websocket that is told to end may go on reading."""
    done: Future[str] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001  handed on
            done.set_exception(error)

    threading.Thread(target=run, name="follow-job", daemon=True).start()
    return done.result()


def jobs(site: Site) -> list[JobDetails]:
    """The jobs that verbs were submitted as, newest first."""
    client = jobs_of(site)
    with _errors(site):
        ours = [each for each in client.list_jobs() if _ATTEMPT.fullmatch(each.submission_id or "")]
    return sorted(ours, key=lambda each: each.start_time or 0, reverse=True)


def stop(site: Site, job: str) -> bool:
    """End a job and wait until it has; False if it had ended before. What it did so far is kept by the verb."""
    client = jobs_of(site)
    with _errors(site):
        was_running = not client.get_job_info(job).status.is_terminal()
        if was_running:
            client.stop_job(job)
        for _ in range(_TRIES_TO_STOP):
            if client.get_job_info(job).status.is_terminal():
                return was_running
            time.sleep(_SECONDS_BETWEEN_TRIES)
    raise UserError(
        f"{job} does not end after {_TRIES_TO_STOP * _SECONDS_BETWEEN_TRIES:.0f} s: look at it in Ray's dashboard"
    )


async def _tail(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> str:
    """The whole output, shown as it comes; a connection that breaks is made again, and nothing is shown twice."""
    shown, failures = "", 0
    client.get_job_info(job)  # an unknown job is an error at once
    while True:
        seen = 0
        try:
            async for lines in client.tail_job_logs(job):
                failures = 0
                new = lines[max(0, len(shown) - seen) :]
                seen += len(lines)
                if new:
                    show(new)
                    shown += new
        except (aiohttp.ClientError, RuntimeError, OSError):
            failures += 1
        try:
            if client.get_job_info(job).status.is_terminal():
                rest = client.get_job_logs(job)[len(shown) :]
                if rest:
                    show(rest)
                return shown + rest
        except (requests.RequestException, RuntimeError):
            failures += 1
        if failures > _TRIES:
            raise ConnectionError(job)
        await asyncio.sleep(_SECONDS_BETWEEN_TRIES if failures else 0.2)


def _attempts(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """All attempts at what has this name, in their order."""
    matches = [(_ATTEMPT.fullmatch(each.submission_id or ""), each) for each in client.list_jobs()]
    ours = [(int(match[2]), each) for match, each in matches if match and match[1] == name]
    return [each for _, each in sorted(ours, key=lambda pair: pair[0])]


def _document(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
    return None


@contextlib.contextmanager
def _errors(site: Site) -> Generator[None]:
    place = f"{site.ray_dashboard} (site {site.name})"
    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"{place} refuses the Ray token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file of the "
            "cluster's token (or RAY_AUTH_TOKEN)"
        ) from error
    except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
        raise UserError(
            f"no Ray jobs API answers at {place}: check ray_dashboard, and that the cluster runs"
        ) from error
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        if _NO_SUCH_JOB.match(str(error)):
            raise UserError(f"{place} knows no such job: `tavlad --site {site.name} jobs` lists them") from error
        raise UserError(f"{place} refused the request: {lines[-1] if lines else error}") from error
