"""A training whose workers, driver, store, tracking server or disk fail: it ends with the weights of an undisturbed
one, to the bit, has told MLflow every metric once, and leaves nothing behind. Each case prints its row of
docs/RELIABILITY.md."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from infra import local, process
from infra.local_ray import PATIENCE
from infra.site import Site
from ray_jobs.checkpoints import Checkpoints
from ray_jobs.worker import HISTORY
from shards.render import render_videos
from shards.store import Store, open_store
from tavlad.checkpoint import WEIGHTS
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

_EPOCHS = {1: 6, 2: 3}
_TINY = [
    *("model.trunk=resnet18", "model.weights=none", "model.num_clusters=4", "model.gru_width=16"),
    *("training.crop=64", "training.batch_size=8", "training.evaluate_every=3"),
    *(f"stage1.epochs={_EPOCHS[1]}", f"stage2.epochs={_EPOCHS[2]}", "stage1.features=never"),
    *("resources.checkpoint_steps=2", "resources.workers=2"),
]
_SECONDS_TO_RECOVER = 30.0
_KILLS = 5
_LONG = 30
"""Epochs of stage 1 in trainings whose number of workers changes."""
Weights = dict[str, np.ndarray]
_STARTED: list[subprocess.Popen[str]] = []
"""Processes of a test's trainings."""


class Training:
    """`tavlad train` in a process of its own, and what it says, with the time of it."""

    def __init__(self, number: int, *changes: str, **environment: str) -> None:
        """Trainings of different numbers have names of their own and compute the same: the decay they differ in is
        after the last epoch."""
        settings = [*_TINY, f"stage1.decay_every={100 + number}", *changes]
        command = [sys.executable, "-m", "ray_jobs.cli", "train", "demo", "--dataset", "chaos", "--no-register"]
        command += [word for setting in settings for word in ("--set", setting)]
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
            cwd=Path(__file__).parents[2],
        )
        _STARTED.append(self.process)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def when(self, pattern: str) -> float | None:
        """When a line like this was first said."""
        return next((moment for moment, line in list(self.lines) if re.search(pattern, line)), None)

    def until(self, pattern: str, seconds: float = 200) -> float:
        return _until(lambda: self.when(pattern), seconds, self)

    @property
    def recoveries(self) -> list[tuple[float, int]]:
        """When a step was done again, each time that workers were lost, and how many steps were repeated."""
        found = [
            (moment, re.search(r"training again after .*; (\d+) steps", line)) for moment, line in list(self.lines)
        ]
        return [(moment, int(match[1])) for moment, match in found if match]

    @property
    def name(self) -> str:
        (name,) = re.findall(r"Training (\S+)", self.text)
        return name

    def ends_well(self) -> None:
        self.ends_with(0, 300)

    def ends_with(self, code: int, seconds: float) -> None:
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end in {seconds} s: {self.text}")
        self._reader.join()
        assert self.process.returncode == code, self.text


def _until(holds: Callable[[], Any], seconds: float = 120, training: Training | None = None) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        said = "" if training is None else training.text
        assert time.monotonic() < deadline, f"it did not come to that: {said}"
        assert training is None or training.process.poll() is None, said
        time.sleep(0.05)
    return found


@pytest.fixture(autouse=True)
def none_outlives_its_test() -> Generator[None]:
    """A training whose test failed would go on, and wait for services that are down."""
    yield
    for each in _STARTED:
        each.kill()
        each.wait()
    _STARTED.clear()


@pytest.fixture(scope="module")
def chaos_set(local_site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A few rendered videos, packed as `chaos`."""
    folder = tmp_path_factory.mktemp("chaos")
    render_videos(folder, 5, 0, (96, 72))
    command = ["pack", str(folder), "--name", "chaos", "--num-frames", "8", "--short-side", "72"]
    command += ["--layout", "table", "--splits", str(folder / "videos.csv")]
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", *command], check=True)


@dataclass(frozen=True)
class Undisturbed:
    """What a training ends with when nothing happens."""

    weights: Weights
    history: list[dict[str, Any]]


def _runs(site: Site) -> Store:
    return open_store(site.runs_uri, site.s3)


def _checkpoints(site: Site, name: str) -> Checkpoints:
    return Checkpoints(_runs(site).child(f"{name}/checkpoints"))


def _result(site: Site, name: str) -> Undisturbed:
    checkpoints = _checkpoints(site, name)
    assert checkpoints.names()[-1] == f"stage2-epoch{_EPOCHS[2]:05d}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.fetch(checkpoints.names()[-1], Path(folder))
        history = json.loads((Path(folder) / HISTORY).read_text())
        return Undisturbed(load_file(Path(folder) / WEIGHTS), history)


@pytest.fixture(scope="module")
def undisturbed(local_site: Site, chaos_set: None) -> Undisturbed:
    training = Training(0)
    training.ends_well()
    return _result(local_site, training.name)


@pytest.fixture
def ends_as_undisturbed(local_site: Site, undisturbed: Undisturbed) -> Callable[[Training], str]:
    """Asserts all that a disturbed training promises, and says which weights it compared."""

    def check(training: Training) -> str:
        compared = _compared(_result(local_site, training.name), undisturbed)
        _assert_told_once(local_site, training.name, undisturbed.history)
        _until(lambda: not _left_behind(local_site), 60)
        return compared

    return check


def _compared(found: Undisturbed, expected: Undisturbed) -> str:
    """Asserts that all weights are the same to the bit; the row's last column."""
    assert expected.weights.keys() == found.weights.keys()
    for name, tensor in expected.weights.items():
        assert np.array_equal(found.weights[name], tensor), name
    return f"yes: {len(expected.weights)} tensors, bit for bit"


def _assert_told_once(site: Site, name: str, history: list[dict[str, Any]], epochs_before: int = _EPOCHS[1]) -> None:
    """Every metric of every epoch is in MLflow once, in order; those that no clock decides are the undisturbed ones."""
    own = _result(site, name).history
    computed = ("train/loss", "train/top1", "test/top1")
    assert [[row.get(metric) for metric in computed] for row in own] == [
        [row.get(metric) for metric in computed] for row in history
    ]
    client = MlflowClient(site.mlflow_uri)
    experiment = client.get_experiment_by_name("tavlad/chaos")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    for tag, stages, before in (
        (name, (1, 2), epochs_before),
        (f"{name}/stage1", (1,), 0),
        (f"{name}/stage2", (2,), 0),
    ):
        (run,) = [run for run in runs if run.data.tags["tavlad.run"] == tag]
        rows = [row for row in own if row["stage"] in stages]
        for metric in {metric for row in rows for metric in row} - {"stage", "epoch"}:
            points = client.get_metric_history(run.info.run_id, metric)
            assert [(point.step, point.value) for point in points] == [
                (row["epoch"] + before * (row["stage"] == 2), row[metric]) for row in rows if metric in row
            ], (tag, metric)


def _ray_processes(site: Site, word: str) -> list[psutil.Process]:
    """Processes of this test's own cluster whose title has the word."""
    cluster = {member.pid for member in process.members(f"{site.state}:ray")}
    found: list[psutil.Process] = []
    for each in psutil.process_iter():
        try:
            if word in " ".join(each.cmdline()) and cluster & {each.pid, *(parent.pid for parent in each.parents())}:
                found.append(each)
        except psutil.Error:
            continue
    return found


_ASK = """
import sys
from infra.site import activate, load_site
site = load_site()
activate(site)
import ray
from ray_jobs.cluster import connect
connect(site)
groups = ray.util.placement_group_table()
print(eval(sys.argv[1]))
"""
_CPUS = 'ray.cluster_resources()["CPU"]'
_GROUPS = 'sum(each["state"] != "REMOVED" for each in groups.values())'


_NODE_OF_ONE_CPU = 'next(each["NodeID"] for each in ray.nodes() if each["Alive"] and each["Resources"]["CPU"] == 1)'


def _ask_cluster(expression: str) -> int:
    return int(float(_told_by_cluster(expression)))


def _told_by_cluster(expression: str) -> str:
    command = [sys.executable, "-c", _ASK, expression]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def _left_behind(site: Site) -> str:
    for word in ("RayTrainWorker", "TrainController", "PreemptionWatcher", "SynchronizationActor", "ray::_Monitor"):
        if left := _ray_processes(site, word):
            return f"{word}: {left}"
    groups = _ask_cluster(_GROUPS)
    return f"{groups} placement groups" if groups else ""


def _until_saved(site: Site, training: Training) -> None:
    """The training runs, and would not begin anew."""
    training.until("beginning with")
    _until(lambda: _newest(site, training) >= "stage1-epoch00001", training=training)


def _newest(site: Site, training: Training) -> str:
    return max(_checkpoints(site, training.name).names(), default="")


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[str, str, str, str, str], None]:
    """Prints a row: the fault, what was seen, steps repeated, seconds to recover, which weights were compared."""

    def row(fault: str, seen: str, repeated: str, seconds: str, compared: str) -> None:
        with capsys.disabled():
            print(f"\n| {fault} | {seen} | {repeated} | {seconds} | {compared} |", flush=True)  # noqa: T201

    return row


Show = Callable[[str, str, str, str, str], None]
_NONE_COMPARED = "nothing to compare: no last checkpoint"


def _kill_service(site: Site, name: str) -> None:
    for member in process.members(f"{site.state}:{name}"):
        member.kill()


def test_a_killed_worker_is_replaced_within_half_a_minute(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    """Five times, now one rank, now the other; each time once a new checkpoint is there."""
    training = Training(1)
    _until_saved(local_site, training)
    seconds: list[float] = []
    for number in range(_KILLS):
        newest = _newest(local_site, training)
        _until(lambda: _newest(local_site, training) > newest, training=training)  # noqa: B023
        _ray_processes(local_site, "RayTrainWorker")[number % 2].kill()
        killed = time.monotonic()
        _until(lambda: len(training.recoveries) == number + 1, training=training)  # noqa: B023
        seconds.append(training.recoveries[-1][0] - killed)
    training.ends_well()
    told = r"worker .* (died|lost).*starting again now \(restart 1 of at most 5 without a new checkpoint\)"
    assert len(re.findall(told, training.text)) == _KILLS, training.text
    assert statistics.median(seconds) < _SECONDS_TO_RECOVER, training.text
    compared = ends_as_undisturbed(training)
    with_median = f"{', '.join(f'{each:.1f}' for each in seconds)} s; median {statistics.median(seconds):.1f} s"
    repeated = ", ".join(str(steps) for _, steps in training.recoveries)
    show(f"kill -9 of a worker, {_KILLS} times", "said at once; started again", repeated, with_median, compared)
    show("(what was said meanwhile)", _said(training, "died", "training again"), "", "", "")


def test_workers_killed_while_they_start_are_started_again(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(10)
    _until_saved(local_site, training)
    killed: set[int] = set()

    def kill_one(seconds: float) -> None:
        others = _until(
            lambda: [each for each in _ray_processes(local_site, "RayTrainWorker") if each.pid not in killed],
            training=training,
        )
        time.sleep(seconds)
        killed.update(each.pid for each in others)
        others[-1].kill()

    began = time.monotonic()
    for seconds in (0, 0, 1, 2.5):  # the first one trains; the others are at different points of their start
        kill_one(seconds)
    again = training.until("training again after")
    training.ends_well()
    restarts = re.findall(r"\(restart (\d)", training.text)
    compared = ends_as_undisturbed(training)
    seen = f"restarts {', '.join(restarts)}, each after a longer pause"
    show(
        "kill -9 of workers that are just starting, 3 times in a row",
        seen,
        _repeated(training),
        f"{again - began:.0f} s",
        compared,
    )


@pytest.mark.parametrize("moment", ["training", "starting"])
def test_a_killed_controller_of_ray_train_is_started_again(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show, moment: str
) -> None:
    training = Training(11 if moment == "training" else 23)
    if moment == "training":
        _until_saved(local_site, training)
    else:
        _until(lambda: _ray_processes(local_site, "RayTrainWorker"), training=training)
    for each in _ray_processes(local_site, "TrainController"):
        each.kill()
    killed = time.monotonic()
    again = training.until("training again after")
    training.ends_well()
    assert training.when("Ray's controller of the training was lost") is not None, training.text
    compared = ends_as_undisturbed(training)
    show(
        f"kill -9 of Ray Train's controller while it is {moment}",
        "said; Ray Train started again",
        _repeated(training),
        f"{again - killed:.1f} s",
        compared,
    )


def _repeated(training: Training) -> str:
    return ", ".join(str(steps) for _, steps in training.recoveries)


def _said(training: Training, first: str, last: str) -> str:
    """What was said from one line to another, with the seconds since the first."""
    shown: list[str] = []
    began = None
    for moment, line in training.lines:
        began = moment if began is None and first in line else began
        if began is not None:
            shown.append(f"{moment - began:.1f} s: {line.strip()}")
        if began is not None and last in line:
            break
    return "; ".join(shown)


def test_a_killed_driver_goes_on_when_it_is_submitted_again(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(2)
    _until_saved(local_site, training)
    training.process.kill()
    training.process.wait()
    submitted = time.monotonic()
    again = Training(2)
    step = again.until("the first step is done")
    again.ends_well()
    assert again.when("going on from checkpoint stage") is not None, "killed too late to prove anything"
    compared = ends_as_undisturbed(again)
    seen = "went on from the newest checkpoint, in the same MLflow runs"
    seconds = f"{step - submitted:.1f} s from the submission"
    show("kill -9 of the driver, submitted again", seen, "at most 2", seconds, compared)


def test_a_store_that_is_killed_while_a_checkpoint_is_written_is_waited_for(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(3)
    _until_saved(local_site, training)

    def is_writing() -> bool:
        paths = _runs(local_site).list(f"{training.name}/checkpoints/")
        begun = {"/".join(path.split("/")[:3]) for path in paths}  # RUN/checkpoints/NAME
        return any(f"{each}/complete.json" not in paths for each in begun)

    _until(is_writing, training=training)
    _kill_service(local_site, "s3")
    time.sleep(30)
    assert training.process.poll() is None, training.text
    local.up(services=["s3"])
    up = time.monotonic()
    answers = training.until("the store answers again")
    training.ends_well()
    assert training.when("waiting for the store") is not None, training.text
    compared = ends_as_undisturbed(training)
    seen = "said that it waits, and that the store answers again"
    fault = "kill -9 of the S3 server for 30 s while a checkpoint is written"
    show(fault, seen, _repeated(training) or "0", f"{answers - up:.1f} s after the server was back", compared)


def test_mlflow_away_for_all_of_stage_1_is_told_afterwards(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(4)
    training.until("Training chaos")
    _kill_service(local_site, "mlflow")
    training.until("stage 1 steps: .*, loss")  # the line of its end
    local.up(services=["mlflow"])
    training.ends_well()
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", "deliver"], check=True, capture_output=True)
    compared = ends_as_undisturbed(training)
    show(
        "MLflow away for all of stage 1", "trained on; every metric was told once, later", "0", "none needed", compared
    )


@pytest.fixture
def full_disk(tmp_path: Path) -> Generator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_for_the_cache_is_done_without(
    full_disk: Path, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(5, TAVLAD_CACHE=str(full_disk))
    training.ends_well()
    status = os.statvfs(full_disk)
    assert status.f_bavail * status.f_bsize < 64_000, "it was full"
    compared = ends_as_undisturbed(training)
    show("full disk for the cache", "clips were read from the store", "0", "none needed", compared)


def test_a_worker_told_to_end_leaves_a_checkpoint_within_seconds(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(6, "resources.checkpoint_steps=0")
    _until_saved(local_site, training)
    _ray_processes(local_site, "RayTrainWorker")[-1].send_signal(signal.SIGTERM)
    told = time.monotonic()
    saved = training.until(r"a worker was told to end \(SIGTERM\): saved stage")
    assert saved - told < 10
    training.ends_well()
    assert training.when("; 0 steps are repeated") is not None, training.text
    assert training.when("restart 1 of") is None, "an announced end is not counted"
    compared = ends_as_undisturbed(training)
    seen = f"a checkpoint {saved - told:.1f} s later; not counted as a failure"
    show("SIGTERM to a worker", seen, _repeated(training), f"{training.recoveries[0][0] - told:.1f} s", compared)


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_goes_on(
    local_site: Site, ends_as_undisturbed: Callable[[Training], str], show: Show
) -> None:
    training = Training(24, "resources.checkpoint_steps=0")
    _until_saved(local_site, training)
    newest = _newest(local_site, training)
    training.process.send_signal(signal.SIGINT)
    told = time.monotonic()
    training.ends_with(130, 120)
    stopped = time.monotonic()
    saved = _newest(local_site, training)
    assert saved > newest
    assert training.when(f"the training is being stopped: saved {saved}$") is not None, training.text
    assert re.search(r"stopped; to go on, run: tavlad train demo --dataset chaos .*decay_every=124", training.text)
    assert "Traceback" not in training.text
    assert _status(local_site, training.name) == "KILLED"
    _until(lambda: not _left_behind(local_site), 60)
    again = Training(24, "resources.checkpoint_steps=0")
    again.until(f"going on from checkpoint {saved}")
    again.ends_well()
    compared = ends_as_undisturbed(again)
    seen = "said how to go on, run KILLED; the same command went on from there"
    show("Ctrl-C", seen, "0", f"{stopped - told:.1f} s to stop", compared)


def test_a_second_ctrl_c_ends_a_training_at_once(local_site: Site, chaos_set: None) -> None:
    """The workers are held, so that no step ends and the first one is still waited for."""
    training = Training(25)
    _until_saved(local_site, training)
    for each in _ray_processes(local_site, "RayTrainWorker"):
        each.suspend()
    training.process.send_signal(signal.SIGINT)
    training.until("stopping after this step")
    training.process.send_signal(signal.SIGINT)
    training.ends_with(130, 50)
    assert training.when("stopped; to go on, run: tavlad train") is not None, training.text
    assert _status(local_site, training.name) == "KILLED"
    _until(lambda: not _left_behind(local_site), 60)


def _status(site: Site, name: str) -> str:
    """MLflow's, of the training's run."""
    client = MlflowClient(site.mlflow_uri)
    experiment = client.get_experiment_by_name("tavlad/chaos")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`tavlad.run` = '{name}'")
    return run.info.status


def test_a_mistake_of_the_user_ends_the_training_at_once(chaos_set: None, show: Show) -> None:
    training = Training(7, "stage1.lr=1e30")
    training.process.wait(timeout=200)
    assert training.process.returncode == 2, training.text
    assert training.when(r"error: the loss became .* lower stage1\.lr") is not None, training.text
    assert training.when("starting again") is None, training.text
    assert "Traceback" not in training.text
    show(
        "a mistake of the user (loss no number)", "one sentence, exit code 2", "never tried again", "–", _NONE_COMPARED
    )


def test_a_model_too_large_for_the_memory_ends_the_training_at_once(chaos_set: None) -> None:
    training = Training(12, "model.gru_width=500000")
    training.process.wait(timeout=200)
    assert training.process.returncode == 2, training.text
    assert training.when(r"error: the machine's memory is too small for this: lower training\.batch_size"), (
        training.text
    )
    assert "Traceback" not in training.text


def test_a_worker_ended_for_its_nodes_lack_of_memory_ends_the_training_at_once(
    local_site: Site, undisturbed: Undisturbed, join: "Callable[..., subprocess.Popen[bytes]]", show: Show
) -> None:
    """Ray's own monitor of a node's memory ends the worker; a node that takes any use for too much is enough for it."""
    cpus = _ask_cluster(_CPUS)
    join(RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100")
    _until(lambda: _ask_cluster(_CPUS) == cpus + 1)
    training = Training(13, f"resources.workers={cpus + 1}")
    training.ends_with(2, 200)
    assert training.when("error: a node ran out of memory, and Ray ended a process") is not None, training.text
    assert training.when("starting again") is None, training.text
    assert "Traceback" not in training.text
    _until(lambda: not _left_behind(local_site), 60)
    show("a node out of memory", "one sentence, exit code 2", "never tried again", "–", _NONE_COMPARED)


_NODE = """
import sys
import time
from ray._private.node import Node
from ray._private.parameter import RayParams
names = ("dashboard_agent_listen_port", "runtime_env_agent_port", "metrics_agent_port", "metrics_export_port")
ports = dict(zip(names, map(int, sys.argv[2:]), strict=True))
params = RayParams(
    gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=1, object_store_memory=100_000_000,
    min_worker_port=0, max_worker_port=0, **ports,
)
Node(params, head=False, spawn_reaper=False)
while True:
    time.sleep(1)
"""
"""What `ray start` does for a node, which refuses one beside a head that keeps to loopback (infra/site.py)."""
_PORTS_OF_A_NODE = 4


@pytest.fixture
def join(local_site: Site) -> "Generator[Callable[..., subprocess.Popen[bytes]]]":
    """Adds a node of one CPU to the cluster: a raylet of its own, with these variables of Ray's."""
    nodes: list[subprocess.Popen[bytes]] = []

    def start(**variables: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", _NODE, local_site.ray_address]
        command += [str(free_port()) for _ in range(_PORTS_OF_A_NODE)]
        environment = os.environ | local_site.ray_environment() | {"TAVLAD_HOME": str(local_site.state)}
        environment |= PATIENCE | variables
        nodes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
        )
        return nodes[-1]

    cpus = _ask_cluster(_CPUS)
    yield start
    for node in nodes:
        _kill_node(node)
    _until(lambda: _ask_cluster(_CPUS) == cpus)  # Ray takes a while to see that a node is gone


def _announce_end(site: Site, seconds: int) -> None:
    """Tell Ray that the joined node will be taken away, as its autoscaler does for a spot machine."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={site.ray_address}"]
    command += [f"--node-id={_told_by_cluster(_NODE_OF_ONE_CPU)}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message=spot", f"--deadline-remaining-seconds={seconds}"]
    subprocess.run(command, env=os.environ | site.ray_environment(), check=True, capture_output=True)


def _kill_node(node: "subprocess.Popen[bytes]") -> None:
    if node.poll() is None:
        for each in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            each.kill()
        node.wait()


@pytest.fixture(scope="module")
def fixed_order(local_site: Site, chaos_set: None) -> tuple[list[str], Undisturbed]:
    """Settings for sums in a fixed order, of which any number of workers makes the same; and what one makes of them."""
    settings = ["resources.reduce=deterministic", f"resources.virtual_ranks={_ask_cluster(_CPUS) + 2}"]
    settings.append(f"stage1.epochs={_LONG}")
    alone = Training(8, *settings, "resources.workers=1")
    alone.ends_well()
    return settings, _result(local_site, alone.name)


def _assert_made_by_any_number(site: Site, training: Training, expected: Undisturbed) -> str:
    compared = _compared(_result(site, training.name), expected)
    _assert_told_once(site, training.name, expected.history, _LONG)
    _until(lambda: not _left_behind(site), 60)
    return compared


def test_a_training_goes_on_with_fewer_workers_and_grows_again(
    local_site: Site,
    fixed_order: tuple[list[str], Undisturbed],
    join: "Callable[..., subprocess.Popen[bytes]]",
    show: Show,
) -> None:
    """Three workers, say, two after a node is killed, three again: with virtual ranks, the bits of one worker."""
    settings, expected = fixed_order
    cpus = _ask_cluster(_CPUS)
    node = join()
    _until(lambda: _ask_cluster(_CPUS) == cpus + 1)
    training = Training(9, *settings, f"resources.workers=1-{cpus + 1}", "resources.resize_seconds=5")
    _until_saved(local_site, training)
    assert training.when(f"beginning with {cpus + 1} workers") is not None, training.text
    _kill_node(node)
    killed = time.monotonic()
    training.until(f"(going on from checkpoint .*|beginning) with {cpus} workers")
    join()
    joined = time.monotonic()
    training.until(f"the cluster has room for {cpus + 1} workers")
    training.until(f"going on from checkpoint .* with {cpus + 1} workers")
    training.ends_well()
    compared = _assert_made_by_any_number(local_site, training, expected)
    seen = f"{cpus + 1} workers, then {cpus}, then {cpus + 1}; the bits of one worker"
    fault = f'a node of {cpus + 1} CPUs\' lost, another joins (`workers = "1-{cpus + 1}"`, deterministic)'
    seconds = f"{training.recoveries[0][0] - killed:.1f} s; to grow again {training.recoveries[1][0] - joined:.1f} s"
    show(fault, seen, _repeated(training), seconds, compared)


def test_a_node_that_is_to_be_taken_away_leaves_a_checkpoint(
    local_site: Site,
    fixed_order: tuple[list[str], Undisturbed],
    join: "Callable[..., subprocess.Popen[bytes]]",
    show: Show,
) -> None:
    """As a cloud takes a spot machine: its end is announced, then it comes."""
    settings, expected = fixed_order
    cpus = _ask_cluster(_CPUS)
    node = join()
    _until(lambda: _ask_cluster(_CPUS) == cpus + 1)
    training = Training(14, *settings, f"resources.workers=1-{cpus + 1}", "resources.checkpoint_steps=0")
    _until_saved(local_site, training)
    _announce_end(local_site, seconds=45)
    told = time.monotonic()
    saved = training.until("a node is about to be taken away: saved stage")
    _until(lambda: node.poll() is not None or time.monotonic() > told + 45, 60)
    _kill_node(node)
    training.until(f"going on from checkpoint .* with {cpus} workers")
    training.ends_well()
    assert "restart 1 of" not in training.text, "an announced end is not counted"
    compared = _assert_made_by_any_number(local_site, training, expected)
    seen = f"a checkpoint {saved - told:.1f} s later; went on with {cpus} workers; not counted as a failure"
    show(
        "a node of which Ray is told that it will be taken away",
        seen,
        _repeated(training),
        f"{training.recoveries[0][0] - told:.1f} s",
        compared,
    )
