"""The embedded site: a real S3 server, an MLflow server and a Ray cluster on this machine, for one state folder.

`up` starts what does not run or is not well, `down` ends it, `status` looks without touching. Each may be called at
any time by any number of processes: changes are made one process at a time.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from infra.local_mlflow import MLFLOW
from infra.local_ray import RAY, ray_address, ray_dashboard
from infra.local_s3 import S3, s3_access
from infra.process import age_s, end, is_running, start
from infra.service import BUCKET, Service, Started, State, choose_ports, write_private
from infra.site import Site, SiteError, load_site, site_file, state_folder

Progress = Callable[[str], None]
_SERVICES = (S3, MLFLOW, RAY)
_PATIENCE_S = 30.0  # a machine busy with training may be slow to answer; that is no reason to end the training
_LOG_LINES = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceStatus:
    """How a service is now."""

    name: str
    running: bool
    """Its process lives and it answers."""
    pid: int | None
    address: str
    log: Path
    detail: str


def up(progress: Progress | None = None, services: Collection[str] = ("s3", "mlflow", "ray")) -> Site:
    """Starts those of the services that are not running well, and returns the site. Raises `SiteError`.

    The others are left as they are; MLflow keeps its artifacts on S3, so name both. `progress` is called with one short
    line at a time, never by two threads at once.
    """
    report = _one_at_a_time(progress)
    assert set(services) <= {service.name for service in _SERVICES}
    wanted = [service for service in _SERVICES if service.name in services]
    with _locked(state_folder(), report) as state:
        for service in _SERVICES:
            if not state.started.setdefault(service.name, Started()).ports:
                state.started[service.name].ports = choose_ports(service, state)
        with ThreadPoolExecutor(len(_SERVICES)) as pool:
            well = pool.map(lambda service: _is_well(service, state, report), wanted)
        ill = [service for service, is_well in zip(wanted, well, strict=True) if not is_well]
        # Ended first and given their ports together: a service is told the addresses of those it needs.
        _together(lambda service, stop: _clear(service, state), ill)
        for service in ill:
            state.started[service.name].ports = choose_ports(service, state)
        ill += [service for service in wanted if service not in ill and _has_moved(service, state)]
        state.save()
        _together(lambda service, stop: _bring_up(service, state, report, stop), ill)
        for service in wanted:
            _finish(service, state)
        state.save()
        _write_site(state)
    return load_site("local")


def down(progress: Progress | None = None) -> None:
    """Ends every process that `up` started and all their descendants. The data stay."""
    report = _one_at_a_time(progress)
    folder = state_folder()
    if not folder.exists():
        return
    with _locked(folder, report) as state:
        _together(lambda service, stop: _clear(service, state), _SERVICES)
        state.save()


def status() -> list[ServiceStatus]:
    """How each service is, without waiting for it or changing anything."""
    state = State(folder=state_folder(), started={})
    state.load()
    return [_status(service, state) for service in _SERVICES]


def _status(service: Service, state: State) -> ServiceStatus:
    started = state.started.get(service.name)
    address = service.address(state) if started and started.ports else ""
    running, detail = False, "never started"
    if started is not None:
        detail = "stopped"
        if started.pid is not None:
            detail = f"process {started.pid} has ended: `tavlad up` starts it again"
            if is_running(started.pid, state.mark(service)):
                problem = service.problem(state)
                running, detail = problem is None, problem or "answers"
    pid = started.pid if started else None
    return ServiceStatus(
        name=service.name, running=running, pid=pid, address=address, log=state.log(service), detail=detail
    )


def _is_well(service: Service, state: State, report: Progress) -> bool:
    """Whether it runs and answers. One that runs is given time, unless its first process ends meanwhile."""
    pid = state.started[service.name].pid
    if pid is None:
        return False
    # It may still be starting, if the process that started it was interrupted.
    patience_s = max(_PATIENCE_S, service.start_s - age_s(pid))
    began, is_patient = time.monotonic(), False
    while is_running(pid, state.mark(service)):
        problem = service.problem(state)
        # Asked again: a child may answer a moment longer than its parent lives.
        if problem is None and is_running(pid, state.mark(service)):
            return True
        if time.monotonic() - began > patience_s:
            return False
        if not is_patient:
            report(f"{service.name}: waiting for process {pid} to answer")
        is_patient = True
        time.sleep(0.25)
    return False


def _has_moved(service: Service, state: State) -> bool:
    return state.started[service.name].needs != service.needs(state)


def _clear(service: Service, state: State) -> None:
    """Ends whatever is left of the service."""
    started = state.started.setdefault(service.name, Started())
    end(state.mark(service), started.pid, service.grace_s)
    started.pid = None


def _bring_up(service: Service, state: State, report: Progress, stop: threading.Event) -> None:
    began = time.monotonic()
    report(f"{service.name}: starting")
    # Twice: on a very busy machine a server may run into a time limit of its own, and give up.
    if not _starts(service, state, stop) and not stop.is_set():
        report(f"{service.name}: ended while it started, starting it again")
        if not _starts(service, state, stop):
            raise _failure(service, state, "ended while it started, twice")
    if not stop.is_set():
        _finish(service, state)
        report(f"{service.name}: ready after {time.monotonic() - began:.1f} s at {service.address(state)}")


def _starts(service: Service, state: State, stop: threading.Event) -> bool:
    """Starts the server and waits until it answers; False if it ends before, or if waiting has lost its purpose."""
    _clear(service, state)
    started = state.started[service.name]
    started.needs, started.is_finished = service.needs(state), False
    started.pid = start(service.program(state), state.mark(service), state.log(service))
    state.save()
    deadline = time.monotonic() + service.start_s
    while is_running(started.pid, state.mark(service)) and not stop.wait(0.05):
        if (problem := service.problem(state)) is None:
            return True
        if time.monotonic() > deadline:
            raise _failure(service, state, f"does not answer after {service.start_s:.0f} s: {problem}")
    return False


def _finish(service: Service, state: State) -> None:
    started = state.started[service.name]
    if not started.is_finished:
        service.finish(state)
        started.is_finished = True


def _failure(service: Service, state: State, what: str) -> SiteError:
    log = state.log(service)
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return SiteError(f"the embedded {service.name} server {what}; the end of its log {log}:\n" + "\n".join(lines))


def _write_site(state: State) -> None:
    access = s3_access(state)
    values = {
        "ray_address": ray_address(state),
        "ray_dashboard": ray_dashboard(state),
        "s3_endpoint": access.endpoint_url,
        "bucket": BUCKET,
        "mlflow": MLFLOW.address(state),
        "access_key": access.access_key,
        "secret_key": access.secret_key,
    }
    write_private(site_file(state.folder), json.dumps(values, indent=1))


@contextlib.contextmanager
def _locked(folder: Path, report: Progress) -> Generator[State]:
    """The state folder's content, while no other process may change it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "logs").mkdir(exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SiteError(
            f"{folder} cannot hold the local services ({error}): set TAVLAD_HOME to another folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that starts or ends the local services")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        state = State(folder=folder, started={})
        state.load()
        yield state
    finally:
        os.close(descriptor)


def _together(action: Callable[[Service, threading.Event], None], services: Iterable[Service]) -> None:
    """Runs the action for all services at once; the first failure, or an interrupt, lets the others stop waiting."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(_SERVICES)) as pool:
        try:
            for done in as_completed([pool.submit(action, service, stop) for service in services]):
                done.result()
        finally:
            stop.set()


def _one_at_a_time(progress: Progress | None) -> Progress:
    turn = threading.Lock()

    def report(line: str) -> None:
        if progress is not None:
            with turn:
                progress(line)

    return report
