"""A training by two workers on two hosts, one of which is harmed in the middle: the weights of an undisturbed one.

The hosts are network namespaces (tests/host_cluster.py); what is done to them is what happens to machines.
"""

import re
import time
from collections.abc import Callable, Generator

import pytest

from tests.host_cluster import cluster
from tests.hosts import why_not
from tests.rehearsal import Disturbed, Rehearsal, disturbed, rendered, replace_worker, train

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
_CUT_S = 60.0
_MIDDLE = "stage1-epoch00002"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Generator[Rehearsal]:
    """The hosts, a packed set, and what a training comes to that nothing happens to."""
    folder = tmp_path_factory.mktemp("hosts")
    with cluster(folder) as site:
        made = Rehearsal(site, rendered(folder))
        made.pack()
        made.train_by_verb()
        yield made


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[Disturbed, str, str], None]:
    """Prints a row of docs/RELIABILITY.md: the fault, what was seen, steps repeated, seconds to recover, which weights
    were compared."""

    def row(seen: Disturbed, fault: str, compared: str) -> None:
        again = re.findall(r"training again after ([\d.]+) s; (\d+) steps", seen.output)
        told = "; ".join(line.strip() for line in seen.output.splitlines() if "starting again" in line)
        resumed = ", ".join(seen.resumed) or "no checkpoint: it was not interrupted"
        repeated = ", ".join(steps for _, steps in again) or "0"
        seconds = f"next checkpoint after {seen.seconds_to_recover:.0f} s"
        with capsys.disabled():
            print(f"\n| {fault} | {told}; went on from {resumed} | {repeated} | {seconds} | {compared} |")  # noqa: T201

    return row


Show = Callable[[Disturbed, str, str], None]


def check(undisturbed: Rehearsal, seen: Disturbed) -> str:
    """The same weights; every epoch once in MLflow; nothing left of Ray's. Says which weights it compared."""
    assert seen.weights == undisturbed.weights
    site = undisturbed.site
    steps = site.ask("epochs-in-mlflow", "tavlad/rehearsal", "1")
    assert steps == {"stage1": [1, 2, 3, 4, 5, 6], "stage2": [1, 2]}, "each epoch once"
    deadline = time.monotonic() + 60
    while left := site.ask("placement-groups"):
        assert time.monotonic() < deadline, f"placement groups {left} are left"
        time.sleep(1)
    return f"yes: digests of {len(undisturbed.weights) - 1} tensors"  # and the name of the checkpoint they are from


def test_worker_host_that_loses_power_and_is_replaced(undisturbed: Rehearsal, show: Show) -> None:
    site = undisturbed.site
    seen = disturbed(site, train(1), _MIDDLE, lambda: replace_worker(site))
    compared = check(undisturbed, seen)
    assert seen.resumed, "it was started again from a checkpoint"
    show(seen, "a worker host loses power (nobody hears its connections end) and is replaced", compared)


def test_worker_host_whose_processes_are_all_killed(undisturbed: Rehearsal, show: Show) -> None:
    site = undisturbed.site

    def harm() -> None:
        site.kill("worker")
        site.add_worker("worker")

    seen = disturbed(site, train(1), _MIDDLE, harm)
    compared = check(undisturbed, seen)
    assert seen.resumed
    show(seen, "kill -9 of all that a worker host runs; it is replaced", compared)


def test_worker_host_that_is_cut_off_for_a_minute(undisturbed: Rehearsal, show: Show) -> None:
    site = undisturbed.site

    def harm() -> None:
        site.cut("worker")
        time.sleep(_CUT_S)
        site.restore("worker")

    seen = disturbed(site, train(1), _MIDDLE, harm)
    compared = check(undisturbed, seen)
    show(seen, "a worker host's cable is cut for 60 s", compared)
