"""When a training that lost its workers is started again, and after how long."""

import pickle

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.util import construct_user_exception_with_traceback

from ray_jobs.cluster import lack_of_memory
from ray_jobs.monitor import Cause, GivenUp, Leaving, Lost, Stopped, _Monitor
from ray_jobs.recipe import load_recipe
from ray_jobs.restarts import cause_of, lacked_memory
from shards.store import StoreUnreachable
from tavlad.errors import UserError


def _died(text: str) -> Cause:
    return Cause(text=text)


def test_restarts_wait_longer_each_time_and_end_without_a_new_checkpoint() -> None:
    monitor = _Monitor()
    assert [monitor.lost(_died("worker 1 died"), 4, "stage1-epoch00001") for _ in range(5)] == [0, 5, 10, 20, None]
    *lost, error = monitor.read()
    assert [type(news) for news in lost] == [Lost] * 4
    assert isinstance(lost[1], Lost)
    assert lost[1].text == ("worker 1 died; starting again in 5 s (restart 2 of at most 4 without a new checkpoint)")
    assert isinstance(error, Stopped)
    assert str(error.error).startswith("worker 1 died; it was started again 4 times without reaching a new checkpoint")
    assert isinstance(error.error, UserError), "machines that die are the user's to look after"
    assert monitor.error() is error.error


def test_a_new_checkpoint_begins_the_count_anew() -> None:
    monitor = _Monitor()
    assert monitor.lost(_died("it died"), 3, None) == 0
    for epoch in range(1, 20):
        newest = f"stage1-epoch{epoch:05}"
        assert [monitor.lost(_died("it died"), 3, newest), monitor.lost(_died("it died"), 3, newest)] == [0, 5]
        assert monitor.lost(_died("it died, and the store does not answer"), 3, None) == 10


def test_an_announced_end_is_started_again_at_once_any_number_of_times() -> None:
    monitor = _Monitor()
    for _ in range(20):
        monitor.tell(Leaving(text="SIGTERM"))
        assert monitor.has_left()
        assert monitor.lost(_died("it left"), 1, None) == 0
        assert not monitor.has_left()
    assert monitor.lost(_died("it died"), 0, None) is None


def test_what_the_user_must_mend_is_never_tried_again() -> None:
    monitor = _Monitor()
    first = UserError("lower stage1.lr")
    monitor.tell(Stopped(error=first))
    monitor.tell(Stopped(error=UserError("collateral")))
    assert monitor.lost(_died("it failed"), 100, None) is None
    assert monitor.error() is first


def _failed_in_a_worker(error: Exception) -> WorkerGroupError:
    """As Ray tells it, once it has travelled to the controller."""
    try:
        raise error
    except Exception as raised:  # noqa: BLE001
        failed = WorkerGroupError("1 failed", {0: construct_user_exception_with_traceback(raised)})
    return pickle.loads(pickle.dumps(failed))


def test_what_a_library_raises_is_tried_again_and_then_keeps_its_traceback() -> None:
    cause = cause_of(_failed_in_a_worker(ValueError("Input contains NaN")))
    assert cause.text == "worker 0 failed: ValueError: Input contains NaN"
    monitor = _Monitor()
    assert [monitor.lost(cause, 2, None) for _ in range(3)] == [0, 5, None]
    error = monitor.error()
    assert isinstance(error, GivenUp)
    assert not isinstance(error, ValueError)
    assert "worker 0 failed: ValueError: Input contains NaN; it was started again 2 times" in str(error)
    assert "in _failed_in_a_worker" in str(error), "the traceback"


def test_what_a_user_must_mend_after_many_tries_is_a_sentence_without_traceback() -> None:
    cause = cause_of(_failed_in_a_worker(StoreUnreachable("S3 at 127.0.0.1:1 does not answer")))
    monitor = _Monitor()
    assert [monitor.lost(cause, 0, None)] == [None]
    error = monitor.error()
    assert isinstance(error, UserError)
    assert "\n" not in str(error)
    assert "S3 at 127.0.0.1:1 does not answer; it was started again" in str(error)


def test_a_training_that_the_user_stops_is_not_started_again() -> None:
    monitor = _Monitor()
    monitor.ask_to_stop()
    monitor.tell(Leaving(text="saved stage1-epoch00001-step000002"))
    assert monitor.lost(_died("it left"), 5, None) is None
    assert monitor.error() is None, "nothing is wrong"


_FULL, _DIED = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."), ActorDiedError()


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (_FULL, True),  # the controller itself
        (ControllerError(_FULL), True),  # a worker while it started
        (WorkerGroupError("1 failed", {1: WorkerHealthCheckFailedError("dead", failure=_FULL)}), True),
        (_DIED, False),
        (ControllerError(_DIED), False),
        (WorkerGroupError("1 failed", {1: WorkerHealthCheckFailedError("dead", failure=_DIED)}), False),
        (WorkerGroupError("1 failed", {1: ValueError("no")}), False),
    ],
)
def test_what_ray_ended_for_memory_is_known_whenever_it_was(error: Exception, lacks: bool) -> None:
    assert lacked_memory(error) == lacks


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (_DIED, "Ray's controller of the training was lost"),
        (ControllerError(_DIED), "a worker died, or its node was lost, while the workers were starting"),
        (ControllerError(KeyError("x")), "Ray's controller of the training was lost"),
        (
            WorkerGroupError("", {1: WorkerHealthCheckFailedError("", failure=_DIED)}),
            "worker 1 died, or its node was lost",
        ),
    ],
)
def test_the_cause_of_a_restart_is_one_sentence(error: Exception, cause: str) -> None:
    assert cause_of(error).text == cause


@pytest.mark.parametrize(("text", "range_"), [("3", (3, 3)), ("2-8", (2, 8)), ("1 - 1", (1, 1))])
def test_workers_are_a_number_or_a_range(text: str, range_: tuple[int, int]) -> None:
    resources = load_recipe("demo", [f"resources.workers={text}"], "set").resources
    assert (resources.fewest_workers, resources.most_workers) == range_


@pytest.mark.parametrize("text", ["0", "8-2", "0-2", "many", "2-"])
def test_other_numbers_of_workers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'resources\.workers = .*: must be at least 1, or a range such as "2-8"'):
        load_recipe("demo", [f"resources.workers={text}"], "set")


def test_more_workers_than_virtual_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"resources\.virtual_ranks = 8: must be at least the number of workers \(9\)"):
        load_recipe("demo", ["resources.workers=2-9", "resources.reduce=deterministic"], "set")


def test_memory_that_a_machine_refuses_is_said_in_one_sentence() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    text = lack_of_memory(refused.value)
    assert text == "the machine's memory is too small for this: lower training.batch_size or the model's sizes"
    assert lack_of_memory(RuntimeError("Connection closed by peer")) is None
