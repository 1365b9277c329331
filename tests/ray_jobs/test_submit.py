"""Verbs as jobs: the same twice is one, ended is gone on with, followed, left, listed and stopped; on real Ray."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.site import Site
from ray_jobs.job_parcel import fill_working_folder, make_parcel
from ray_jobs.provenance import Code
from ray_jobs.submit import stop
from shards.store import S3Access
from tests.fixtures_verbs import SHORT, tavlad

RECIPE = 'dataset = "mine"\n[stage1]\nepochs = 3\n'


def parcel_of(recipe: Path, *words: str, **changes: Any):
    values = {"recipe": str(recipe), "split": 1, "change": None, "dataset": None, "register": True} | changes
    return make_parcel("train", [str(recipe), *words], values, "bucket")


def test_name_of_a_job_follows_from_what_it_does(tmp_path: Path) -> None:
    recipe, other = tmp_path / "a.toml", tmp_path / "b.toml"
    recipe.write_text(RECIPE)
    other.write_text("# the same\n" + RECIPE)
    name = parcel_of(recipe).name
    assert re.fullmatch(r"tavlad-train-[0-9a-f]{12}", name)
    assert parcel_of(other).name == name, "neither the file's name nor its comments count"
    assert parcel_of(recipe, change=["stage1.epochs=3", "resources.workers=4"]).name == name, "nor do resources"
    assert parcel_of(recipe, change=["stage1.epochs=4"]).name != name
    assert parcel_of(recipe, split=2).name != name
    assert parcel_of(recipe, dataset="other").name != name
    assert parcel_of(recipe, resume_with_new_code=True).name == name
    assert parcel_of(recipe, fresh=True).name != name


def test_edited_code_never_joins_a_job_of_the_code_before(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text(RECIPE)
    values = {"recipe": str(recipe), "split": 1, "change": None, "dataset": None}

    def name(verb: str, **code: Any) -> str:
        return make_parcel(verb, [], values if verb == "train" else {"dataset": "mine"}, "bucket", Code(**code)).name

    for verb in ("train", "verify"):
        assert name(verb, sources="1") != name(verb, sources="2")
        assert name(verb, sources="1", commit="a") == name(verb, sources="1", commit="b"), "the same code, after all"


def test_parcel_carries_our_code_and_the_inputs_and_no_junk(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text(RECIPE)
    parcel = parcel_of(recipe, "--split", "1")
    assert parcel.arguments == ("inputs/recipe/a.toml", "--split", "1")
    fill_working_folder(parcel, tmp_path / "to")
    files = {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*") if path.is_file()}
    assert {"tavlad/model.py", "ray_jobs/cli.py", "ray_jobs/recipes/ta-vlad.toml", "inputs/recipe/a.toml"} <= files
    assert not [name for name in files if not name.endswith((".py", ".toml", "commit.txt"))]
    assert (tmp_path / "to" / "inputs" / "recipe" / "a.toml").read_text() == RECIPE


def test_path_that_only_this_machine_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"videos is on this machine, .* absolute path that all its nodes see"):
        make_parcel("pack", ["videos"], {"videos": Path("videos"), "name": "x"}, "bucket")


def test_folder_named_as_a_recipe_does_not_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    parcel = parcel_of(Path("small"), dataset="mine")
    assert (parcel.arguments, dict(parcel.inputs)) == (("small",), {})


def test_input_travels_however_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.toml").write_text("[stage1]\nlr = [0.1]\n")
    (tmp_path / "a.toml").write_text(RECIPE)
    values = {"recipe": "./a.toml", "split": 1, "change": None, "dataset": None, "space": Path("./space.toml")}
    for words in (["--space", "./space.toml"], ["--space=./space.toml"]):
        parcel = make_parcel("tune", ["./a.toml", *words], values, "bucket")
        assert " ".join(parcel.arguments).replace("=", " ") == "inputs/recipe/a.toml --space inputs/space/space.toml"


WEIGHTS = [f"model.weights={place}" for place in ("net.pth", "nets/net.pth", "'net.pth'")]


@pytest.mark.parametrize(
    ("verb", "values", "named"),
    [
        ("pack", {"videos": Path("/videos"), "to": "sets/mine"}, "--to sets/mine"),
        ("verify", {"dataset": "sets/mine"}, "the set sets/mine"),
        ("verify", {"dataset": "."}, "the set ."),
        ("reproduce", {"datasets": ["hmdb51", "./mine"], "change": None, "to": Path("/r")}, "the set ./mine"),
        ("evaluate", {"model": "models/3", "dataset": "mine", "also": None}, "the model models/3"),
        ("evaluate", {"model": "a@best", "dataset": "m", "also": ["models/3=m"]}, "the model models/3"),
        ("evaluate", {"model": "a@best", "dataset": "m", "also": ["b@best=./m"]}, "the set ./m"),
        *(("train", {"recipe": "small", "split": 1, "change": [each], "dataset": "m"}, "net.pth") for each in WEIGHTS),
        ("train", {"recipe": "small", "split": 1, "change": None, "dataset": "./mine"}, "the set ./mine"),
        ("train", {"recipe": "weights.toml", "split": 1, "change": None, "dataset": None}, "model.weights net.pth"),
        ("train", {"recipe": "set.toml", "split": 1, "change": None, "dataset": None}, "the set ./mine"),
        ("reproduce", {"datasets": ["m"], "to": Path("/r"), "change": ["ta-vlad:model.weights=net.pth"]}, "net.pth"),
        (
            "tune",
            {"recipe": "small", "split": 1, "change": None, "dataset": "m", "space": Path("space.toml")},
            "model.weights net.pth",
        ),
    ],
)
def test_relative_place_that_the_cluster_cannot_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, values: dict[str, Any], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "3").mkdir(parents=True)
    (tmp_path / "weights.toml").write_text(RECIPE + '[model]\nweights = "net.pth"\n')
    (tmp_path / "set.toml").write_text('dataset = "./mine"\n')
    (tmp_path / "space.toml").write_text('[model]\nweights = ["imagenet", "net.pth"]\n')
    remedy = "give an absolute path that all its nodes see, or "
    with pytest.raises(ValueError, match=rf"{re.escape(named)} is on this machine, .*: {remedy}"):
        make_parcel(verb, [], values, "bucket")


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        ("pack", {"videos": Path("/videos"), "to": "s3://bucket/sets/mine"}),
        ("pack", {"videos": Path("/videos"), "to": "/shared/sets/mine"}),
        ("evaluate", {"model": "mine/3", "dataset": "mine", "also": ["models:/a@best=s3://bucket/m"]}),
        ("evaluate", {"model": "/models/3", "dataset": "/sets/mine", "also": None}),
        ("train", {"recipe": "small", "split": 1, "change": ["model.weights=none"], "dataset": "m"}),
        ("train", {"recipe": "small", "split": 1, "change": ["model.weights=/nets/net.pth"], "dataset": "m"}),
        ("train", {"recipe": "small", "split": 1, "change": ["model.weights=s3://b/net.pth"], "dataset": "m"}),
    ],
)
def test_place_that_the_cluster_sees_or_a_name_is_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, values: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not make_parcel(verb, [], values, "bucket").inputs


@pytest.mark.parametrize("verb", ["up", "down", "status"])
def test_verbs_of_the_local_services_refuse_another_site(tmp_path: Path, verb: str) -> None:
    said = tavlad("--site", str(tmp_path / "lab.toml"), verb, TAVLAD_HOME=str(tmp_path / "home"))
    told = f"error: `tavlad {verb}` is for this machine's own services, and the site is {tmp_path}/lab.toml"
    assert (said.code, told in said.err) == (2, True), said.err
    assert tavlad(verb, TAVLAD_HOME=str(tmp_path / "home"), TAVLAD_SITE="lab").code == 2


def test_sweep_travels_with_its_space_and_its_pace_is_not_its_name(tmp_path: Path) -> None:
    recipe, space = tmp_path / "a.toml", tmp_path / "space.toml"
    recipe.write_text(RECIPE)

    def parcel(at_once: int | None, lr: str, workers: int = 1):
        space.write_text(f"[stage1]\nlr = [{lr}]\n")
        words = [str(recipe), "--space", str(space)]
        values = {"recipe": str(recipe), "split": 1, "change": None, "dataset": None, "space": space}
        return make_parcel(
            "tune", words, values | {"trials": 8, "at_once": at_once, "workers_per_trial": workers}, "bucket"
        )

    sweep = parcel(None, "0.1, 0.01")
    assert sweep.arguments == ("inputs/recipe/a.toml", "--space", "inputs/space/space.toml")
    assert sweep.inputs["inputs/space/space.toml"] == space
    assert parcel(2, "0.1, 0.01", workers=2).name == sweep.name
    assert parcel(None, "0.1, 0.02").name != sweep.name


class _Trouble(BaseHTTPRequestHandler):
    """A jobs API that answers as Ray's does where it cannot reach a job's agent, and where there is no such job."""

    def do_GET(self) -> None:
        job = self.path.rpartition("/")[2]
        known, refused, unknown = {"ray_version": "2.60.0"}, f"No agent for {job}", f"Job {job} does not exist"
        code, said = {"version": (200, json.dumps(known)), JOB: (500, refused)}.get(job, (404, unknown))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: Any) -> None: ...


JOB = "tavlad-train-404404404404-1"


def test_a_job_is_unknown_by_the_status_and_not_by_the_digits_of_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Trouble) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)  # Ray's client prefers that of the site in use
        access = S3Access(endpoint_url=None, access_key="", secret_key="")
        lab = Site(name="lab", ray_address="auto", ray_dashboard=address, s3=access, bucket="b", mlflow_uri="")
        with pytest.raises(ValueError, match=r"refused the request: .*status code 500: No agent for"):
            stop(lab, JOB)
        with pytest.raises(ValueError, match="knows no such job"):
            stop(lab, JOB.replace("404", "405"))
        server.shutdown()


@pytest.mark.slow
def test_verb_is_a_job_that_ends_as_the_verb_does(
    local_site: Site,
    lab: Path,
    real_videos: Path,
) -> None:
    videos = real_videos / "videos"
    command = ["--json", "--site", str(lab), "pack", str(videos), "--name", "job", "--num-frames", "2"]
    said = tavlad(*command, "--short-side", "32")
    document = said.document
    assert document["clips"] == 27
    (job,) = re.findall(r"submitted (tavlad-pack-[0-9a-f]{12}-1) to", said.err)
    assert "videos packed" in said.err, "the job's progress is followed"

    listed = tavlad("--json", "--site", str(lab), "jobs").document["jobs"]
    assert {"id": job, "state": "succeeded", "verb": "pack"} in listed
    assert tavlad("--json", "--site", str(lab), "logs", job).document == document

    wrong = tavlad("--site", str(lab), "evaluate", "no-such-model", "--dataset", "job")
    assert wrong.code == 2
    assert "error: " in wrong.out
    assert "no-such-model" in wrong.out
    unknown = tavlad("--site", str(lab), "logs", "tavlad-pack-000000000000-1")
    assert unknown.code == 2
    assert "knows no such job" in unknown.err


@contextlib.contextmanager
def started(*arguments: str) -> Generator["subprocess.Popen[str]"]:
    """A verb that goes on until the block ends."""
    command = [sys.executable, "-m", "ray_jobs.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> str:
    """The first line, and all that follows if it is an error."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return line if "error: " not in line and line else line + process.stdout.read()


@pytest.mark.slow
def test_second_submission_joins_and_ctrl_c_leaves_the_job(
    local_site: Site, lab: Path, packed_clips: dict[str, Any]
) -> None:
    site = ["--site", str(lab)]
    command = ["train", "demo", "--dataset", "real", *SHORT, "--set", "stage1.epochs=10000", "--no-register"]

    def stop(job: str) -> None:
        stopped = json.loads(tavlad("--json", *site, "stop", job).out.splitlines()[-1])
        assert stopped["job"] == job
        deadline = time.monotonic() + 60
        while True:
            states = {each["id"]: each["state"] for each in tavlad("--json", *site, "jobs").document["jobs"]}
            if states[job] == "stopped":
                return
            assert time.monotonic() < deadline, states

    with started(*site, *command) as first:
        line = said(first)
        found = re.fullmatch(r"submitted (\S+) to \S+\n", line)
        assert found, line
        job = found[1]
        with started(*site, *command) as second:
            assert said(second) == f"{job} runs already: joined\n"
            for process in (first, second):
                process.send_signal(signal.SIGINT)
                out, _ = process.communicate(timeout=60)
                assert process.returncode == 130
                assert f"{job} goes on; " in out
    stop(job)
    with started(*site, *command) as again:
        assert f"submitted {job.rpartition('-')[0]}-2 to" in said(again)
    stop(f"{job.rpartition('-')[0]}-2")
