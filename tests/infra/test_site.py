"""Site files, the variables that override them, and what is told to whom."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from infra import site
from infra.service import State
from infra.site import Site, SiteError, activate, load_site

SITE = """
ray_address = "head:6379"
ray_dashboard = "http://head:8265/"
s3_endpoint = "http://s3:9000"
bucket = "videos"
mlflow = "http://mlflow:5000"
"""


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TAVLAD_", "AWS_", "RAY_AUTH")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TAVLAD_S3_ACCESS_KEY", "the-access-key")
    monkeypatch.setenv("TAVLAD_S3_SECRET_KEY", "the-secret-key")


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    file = tmp_path / "lab.toml"
    file.write_text(SITE)
    return file


def test_a_site_file_is_read(lab: Path) -> None:
    found = load_site(str(lab))
    assert (found.ray_address, found.ray_dashboard) == ("head:6379", "http://head:8265")
    assert (found.s3.endpoint_url, found.s3.access_key, found.s3.region) == (
        "http://s3:9000",
        "the-access-key",
        "us-east-1",
    )
    assert (found.mlflow_uri, found.state) == ("http://mlflow:5000", None)
    assert found.dataset_uri("hmdb51") == "s3://videos/datasets/hmdb51"
    assert found.runs_uri == "s3://videos/runs"
    assert found.codebooks_uri == "s3://videos/codebooks"


def test_the_shipped_example_is_a_valid_site() -> None:
    assert load_site("example").bucket == "tavlad"


def test_amazon_needs_no_endpoint(lab: Path) -> None:
    lab.write_text(SITE.replace('s3_endpoint = "http://s3:9000"', 's3_region = "eu-west-1"'))
    found = load_site(str(lab))
    assert (found.s3.endpoint_url, found.s3.region) == (None, "eu-west-1")


def test_variables_override_the_file(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVLAD_BUCKET", "other")
    assert load_site(str(lab)).bucket == "other"


def test_the_usual_amazon_variables_serve_as_keys(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAVLAD_S3_ACCESS_KEY")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "amazon")
    assert load_site(str(lab)).s3.access_key == "amazon"


def test_an_unknown_key_names_the_nearest(lab: Path) -> None:
    lab.write_text(SITE + 's3_endpiont = "http://x"')
    with pytest.raises(SiteError, match=r"lab\.toml has an unknown key 's3_endpiont': .* 's3_endpoint'"):
        load_site(str(lab))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SITE.replace('bucket = "videos"', ""), "lacks 'bucket': .* TAVLAD_BUCKET"),
        (SITE.replace('"videos"', "3"), "must be a string"),
        (SITE.replace('"videos"', '"No Bucket"'), "no bucket name"),
        (SITE.replace("http://mlflow", "mlflow"), "mlflow of site .* must start with http"),
        (SITE.replace("http://mlflow", "http://[mlflow"), "mlflow of site .* that is no address"),
        (SITE.replace('"head:6379"', '""'), "ray_address of site .* is empty"),
        ("bucket = ", "is not a TOML file"),
    ],
)
def test_a_wrong_site_file_says_what_is_wrong(lab: Path, wrong: str, message: str) -> None:
    lab.write_text(wrong)
    with pytest.raises(SiteError, match=message):
        load_site(str(lab))


def test_an_unknown_site_lists_the_known_ones() -> None:
    with pytest.raises(SiteError, match=r"no site 'nowhere' .* local, example"):
        load_site("nowhere")


def test_missing_keys_say_which_variable_to_set(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAVLAD_S3_SECRET_KEY")
    with pytest.raises(SiteError, match="set TAVLAD_S3_SECRET_KEY"):
        load_site(str(lab))


def test_local_without_services_says_how_to_start_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVLAD_HOME", str(tmp_path / "none"))
    with pytest.raises(SiteError, match=r"none: run `tavlad up`"):
        load_site("local")
    assert not (tmp_path / "none").exists()


def test_a_site_written_by_another_version_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVLAD_HOME", str(tmp_path))
    for text in ("{}", "not json"):
        site.site_file(tmp_path).write_text(text)
        with pytest.raises(SiteError, match="another version: run `tavlad up` again"):
            load_site()


def write_local_site(state: Path) -> None:
    values = {"ray_address": "127.0.0.1:1", "ray_dashboard": "http://127.0.0.1:2", "s3_endpoint": "http://127.0.0.1:3"}
    values |= {"bucket": "tavlad", "mlflow": "http://127.0.0.1:4", "access_key": "a", "secret_key": "the-secret-key"}
    site.site_file(state).write_text(json.dumps(values))


def load_in_another_process(name: str, environment: dict[str, str]) -> str:
    program = f"from infra.site import load_site; site = load_site({name!r}); print(site.s3.secret_key, site.bucket)"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=Path(site.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_a_worker_finds_the_local_site_by_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_local_site(tmp_path)
    monkeypatch.setenv("TAVLAD_HOME", str(tmp_path))
    environment = load_site("local").worker_environment()
    assert "the-secret-key" not in str(environment)
    assert load_in_another_process("local", environment) == "the-secret-key tavlad"


def test_threads_of_workers_sleep_where_they_wait_unless_told(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, other in (("OMP_WAIT_POLICY", "PASSIVE", "ACTIVE"), ("MALLOC_ARENA_MAX", "1", "2")):
        monkeypatch.delenv(name, raising=False)
        assert load_site(str(lab)).worker_environment()[name] == value
        monkeypatch.setenv(name, other)
        assert load_site(str(lab)).worker_environment()[name] == other


def test_a_worker_needs_no_site_file(lab: Path) -> None:
    environment = load_site(str(lab)).worker_environment()
    lab.unlink()
    assert "the-secret-key" not in str(environment), "Ray's dashboard shows it"
    keys = {"TAVLAD_S3_ACCESS_KEY": "the-key", "TAVLAD_S3_SECRET_KEY": "the-secret-key"}  # of the node itself
    assert load_in_another_process(str(lab), environment | keys) == "the-secret-key videos"


def test_a_site_shows_no_secret(lab: Path) -> None:
    found = load_site(str(lab))
    assert "the-secret-key" not in repr(found)
    assert "the-secret-key" not in str(found.ray_environment())


def activated(found: Site, ambient: dict[str, str]) -> dict[str, str]:
    """The environment of a process after `activate`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ambient.items():
            patch.setenv(name, value)
        before = dict(os.environ)
        activate(found)
        after = dict(os.environ)
        os.environ.clear()
        os.environ.update(before)
    return after


def test_activation_points_ray_and_mlflow_to_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_local_site(tmp_path)
    monkeypatch.setenv("TAVLAD_HOME", str(tmp_path))
    after = activated(
        load_site("local"), {"RAY_AUTH_TOKEN": "foreign", "http_proxy": "http://proxy", "no_proxy": "lab"}
    )
    assert after["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:4"
    assert after["RAY_ADDRESS"] == "127.0.0.1:1"
    assert after["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray_token")
    assert "RAY_AUTH_TOKEN" not in after
    assert after["no_proxy"] == "lab,127.0.0.1,localhost"


def test_another_site_keeps_the_users_ray_token(lab: Path) -> None:
    after = activated(load_site(str(lab)), {"RAY_AUTH_TOKEN": "theirs", "RAY_AUTH_MODE": "token"})
    assert after["RAY_AUTH_TOKEN"] == "theirs"
    assert "RAY_AUTH_TOKEN_PATH" not in after


def test_services_that_start_together_are_given_the_same_keys(tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        state = State(folder=folder, started={})
        together = threading.Barrier(3)

        def keys(state: State = state, together: threading.Barrier = together) -> tuple[str, str]:
            together.wait()
            return state.keys()

        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(keys) for _ in range(3)]
        assert len({each.result() for each in asked}) == 1


def test_nodes_cache_lies_where_the_node_says_else_beside_the_embedded_site(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = load_site(str(lab))
    assert site.cache_folder(elsewhere).name == f"tavlad-cache-{os.getuid()}"
    assert site.cache_folder(replace(elsewhere, state=tmp_path)) == tmp_path / "cache"
    monkeypatch.setenv("TAVLAD_CACHE", str(tmp_path / "fast disk"))
    assert site.cache_folder(elsewhere) == tmp_path / "fast disk"
    assert "TAVLAD_CACHE" not in elsewhere.worker_environment()  # each node has its own
    assert replace(elsewhere, state=tmp_path).worker_environment()["TAVLAD_CACHE"] == str(tmp_path / "fast disk")


def test_keys_come_from_a_private_file(lab: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("file-access\nfile-secret\n")
    lab.write_text(SITE + f's3_keys = "{keys}"\n')
    found = load_site(str(lab))
    assert (found.s3.access_key, found.s3.secret_key) == ("file-access", "file-secret")
    environment = found.worker_environment()
    assert environment["TAVLAD_S3_KEYS"] == str(keys), "a worker reads the file itself"
    assert "file-secret" not in str(environment)
    keys.chmod(0o644)
    with pytest.raises(SiteError, match="everybody can read it: chmod 600"):
        load_site(str(lab))
    keys.chmod(0o600)
    keys.write_text("one-line-that-is-secret\n")
    with pytest.raises(SiteError, match=r"must hold two lines, .* and has 1") as caught:
        load_site(str(lab))
    assert "one-line-that-is-secret" not in str(caught.value)


def test_role_and_submission_need_no_keys(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAVLAD_S3_ACCESS_KEY")
    monkeypatch.delenv("TAVLAD_S3_SECRET_KEY")
    assert load_site(str(lab), keys=False).s3.secret_key == ""
    lab.write_text(SITE + 's3_keys = "role"\n')
    assert load_site(str(lab)).s3.access_key == ""


def test_job_knows_what_its_runtime_environment_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not site.is_in_job()
    assert site.job_variables() == set()
    job = {"runtime_env": {"env_vars": {"TAVLAD_BUCKET": "b"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert site.is_in_job()
    assert site.job_variables() == {"TAVLAD_BUCKET"}


def test_ray_address_auto_is_left_to_ray(lab: Path) -> None:
    lab.write_text(SITE.replace("head:6379", "auto"))
    assert "RAY_ADDRESS" not in load_site(str(lab)).ray_environment()
