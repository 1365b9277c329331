"""The embedded site: real servers that come up, heal, stay apart and end without a trace."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import local, process
from infra.local import ServiceStatus
from infra.site import Site, SiteError, load_site, state_folder
from shards.store import open_store
from tests.fixtures_services import temporary_home

REPOSITORY = Path(local.__file__).parents[1]


@pytest.fixture(scope="module")
def harmed_site() -> Generator[Site]:
    """A site with all services, for tests that do harm to it and then heal it."""
    with temporary_home():
        yield local.up()


@pytest.fixture
def harmed_home(harmed_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the harmed site the one that `up`, `down` and `status` are about."""
    monkeypatch.setenv("TAVLAD_HOME", str(harmed_site.state))


@pytest.fixture
def home() -> Generator[Path]:
    """A state folder of this test's own."""
    with temporary_home() as home:
        yield home


def members(service: str) -> list[psutil.Process]:
    return process.members(f"{state_folder()}:{service}")


def named(service: str) -> ServiceStatus:
    return next(found for found in local.status() if found.name == service)


def request(url: str, body: dict[str, object] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
        return json.loads(answer.read())


def everything() -> list[psutil.Process]:
    return [member for service in ("s3", "mlflow", "ray") for member in members(service)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [found for found in processes if found.is_running() and found.status() != psutil.STATUS_ZOMBIE]


def kill(service: str, part: str) -> None:
    """kill -9 of the service's process whose command line contains `part`."""
    chosen = [member for member in members(service) if part in " ".join(member.cmdline())]
    chosen[0].kill()
    while alive(chosen[:1]):
        time.sleep(0.01)


def run_on_ray(site: Site, code: str) -> str:
    """What a driver in a process of its own prints."""
    connect = (
        "from infra.site import activate, load_site\nactivate(load_site())\nimport ray\nray.init(logging_level=40)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", connect + code],
        env=os.environ | {"TAVLAD_HOME": str(site.state)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(site: Site, *arguments: str) -> str:
    """What `ray job submit` prints."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", *arguments]
    environment = os.environ | site.ray_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_status_and_down_without_services_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVLAD_HOME", str(tmp_path / "home"))
    assert [found.detail for found in local.status()] == ["never started"] * 3
    local.down()
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_all_services_answer_and_a_second_up_leaves_them_alone(local_site: Site) -> None:
    before = local.status()
    assert [(found.name, found.running, found.detail) for found in before] == [
        ("s3", True, "answers"),
        ("mlflow", True, "answers"),
        ("ray", True, "answers"),
    ]
    lines: list[str] = []
    assert local.up(lines.append) == local_site
    assert local.status() == before
    assert lines == []


@pytest.mark.slow
def test_mlflow_keeps_artifacts_in_the_bucket(local_site: Site) -> None:
    url = f"{local_site.mlflow_uri}/api/2.0/mlflow-artifacts/artifacts/test/note.txt"
    urllib.request.urlopen(urllib.request.Request(url, b"kept", method="PUT")).close()
    assert open_store("s3://tavlad/mlflow", local_site.s3).read("test/note.txt") == b"kept"


@pytest.mark.slow
def test_a_worker_loads_the_site_and_reads_the_store(local_site: Site) -> None:
    open_store("s3://tavlad/test-worker", local_site.s3).write("a", b"from the bucket")
    code = """
@ray.remote
def read():
    from infra.site import load_site
    from shards.store import open_store
    return open_store("s3://tavlad/test-worker", load_site().s3).read("a").decode()
print(ray.get(read.remote()))
"""
    assert run_on_ray(local_site, code) == "from the bucket"


@pytest.mark.slow
def test_jobs_are_submitted_with_the_token_and_refused_without(local_site: Site) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{local_site.ray_dashboard}/api/jobs/")
    assert "ran here" in submit(local_site, "--", "echo", "ran here")


@pytest.mark.slow
def test_everything_listens_on_loopback_only(local_site: Site) -> None:
    listening = [
        connection.laddr
        for service in ("s3", "mlflow", "ray")
        for member in members(service)
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 20
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@pytest.mark.slow
def test_secrets_are_for_the_owner_only(local_site: Site) -> None:
    assert local_site.state is not None
    assert stat.S_IMODE(local_site.state.stat().st_mode) == 0o700
    secret = local_site.s3.secret_key
    for file in local_site.state.iterdir():
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    command_lines = [" ".join(member.cmdline()) for name in ("s3", "mlflow", "ray") for member in members(name)]
    assert not [line for line in command_lines if secret in line]
    assert not [log for log in (local_site.state / "logs").iterdir() if secret in log.read_text(errors="replace")]


@pytest.mark.slow
@pytest.mark.usefixtures("harmed_home")
@pytest.mark.chaos
def test_parts_that_were_killed_are_healed_with_their_data(harmed_site: Site) -> None:
    store = open_store("s3://tavlad/kept", harmed_site.s3)
    store.write("a", b"still here")
    experiment = request(f"{harmed_site.mlflow_uri}/api/2.0/mlflow/experiments/create", {"name": "kept"})
    kill("s3", "weed")
    kill("mlflow", "uvicorn")
    kill("ray", "raylet/raylet")
    assert local.up() == harmed_site  # the same addresses and keys
    assert [found.running for found in local.status()] == [True] * 3
    assert store.read("a") == b"still here"
    found = request(f"{harmed_site.mlflow_uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=kept")
    assert found["experiment"]["experiment_id"] == experiment["experiment_id"]
    assert run_on_ray(harmed_site, "print(len(ray.nodes()))") == "1"


@pytest.mark.slow
@pytest.mark.usefixtures("harmed_home")
@pytest.mark.chaos
def test_services_whose_first_process_was_killed_are_replaced_whole(harmed_site: Site) -> None:
    local.up()
    before = everything()
    kill("mlflow", "mlflow server")
    kill("ray", "start --head")
    assert local.up() == harmed_site
    assert [found.running for found in local.status()] == [True] * 3
    assert alive(before) == members("s3")


@pytest.mark.slow
@pytest.mark.usefixtures("harmed_home")
def test_down_leaves_no_process(harmed_site: Site) -> None:
    local.up()
    submit(harmed_site, "--no-wait", "--", "sleep", "600")  # a job runs in a session of its own
    before = everything()
    local.down()
    assert alive(before) == []
    assert everything() == []
    assert [found.detail for found in local.status()] == ["stopped"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("harmed_home")
def test_a_port_taken_by_a_stranger_is_replaced() -> None:
    before = local.up(services=["s3"])
    local.down()
    port = int(str(before.s3.endpoint_url).rsplit(":", 1)[1])
    with socket.create_server(("0.0.0.0", port)):
        after = local.up(services=["s3", "mlflow"])
    assert after.s3.endpoint_url != before.s3.endpoint_url
    url = f"{after.mlflow_uri}/api/2.0/mlflow-artifacts/artifacts/note.txt"  # MLflow was told the new address
    urllib.request.urlopen(urllib.request.Request(url, b"x", method="PUT")).close()


@pytest.mark.slow
def test_two_homes_run_side_by_side(home: Path) -> None:
    first = local.up(services=["s3"])
    open_store("s3://tavlad/x", first.s3).write("a", b"first")
    with temporary_home():
        second = local.up(services=["s3"])
        assert second.s3.endpoint_url != first.s3.endpoint_url
        assert second.s3.secret_key != first.s3.secret_key
        assert open_store("s3://tavlad/x", second.s3).list() == []
        local.down()
    assert named("s3").running
    assert open_store("s3://tavlad/x", first.s3).read("a") == b"first"


@pytest.mark.slow
def test_many_ups_at_once_start_one_server(home: Path) -> None:
    program = "from infra import local; print(local.up(services=['s3']).s3.endpoint_url)"

    def up(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(up, range(4)))) == 1
    assert len(members("s3")) == 1


def test_an_up_that_was_killed_is_no_obstacle(home: Path) -> None:
    """Its server is known by its mark alone: it died before it could write down what it had started."""
    local.up(services=["s3"])
    before = members("s3")
    (home / "services.json").unlink()
    local.up(services=["s3"])
    assert len(members("s3")) == 1
    assert members("s3") != before


def test_a_state_folder_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAVLAD_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(SiteError, match="set TAVLAD_HOME to another folder"):
        local.up(services=["s3"])


def test_what_an_interrupted_up_left_undone_is_done_by_the_next(home: Path) -> None:
    program = "import os; from infra import local; local._finish = lambda *_: os._exit(9); local.up(services=['s3'])"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 9
    before = members("s3")
    site = local.up(services=["s3"])
    open_store("s3://tavlad/x", site.s3).write("a", b"the bucket exists")
    assert members("s3") == before


def test_a_server_that_cannot_start_shows_the_end_of_its_log(home: Path) -> None:
    (home / "s3").mkdir()
    (home / "s3" / "filerldb2").write_text("in the way")
    with pytest.raises(
        SiteError, match=r"(?s)the embedded s3 server ended while it started, twice.*logs/s3\.log:\n.*weed/filer"
    ):
        local.up(services=["s3"])
    assert not named("s3").running


@pytest.mark.slow
@pytest.mark.chaos
def test_a_server_that_hangs_is_given_time_before_it_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local.up(services=["s3"])
    (server,) = members("s3")
    server.suspend()
    assert "does not answer" in named("s3").detail
    threading.Timer(4, server.resume).start()
    local.up(services=["s3"])
    assert members("s3") == [server]  # busy, not dead
    server.suspend()
    monkeypatch.setattr(local, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(local, "age_s", lambda _: 3600.0)
    local.up(services=["s3"])
    assert server not in members("s3")
    assert named("s3").running


def test_load_site_agrees_with_up(home: Path) -> None:
    assert local.up(services=["s3"]) == load_site()
