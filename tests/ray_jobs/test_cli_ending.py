"""How the command ends when a verb fails: one sentence for the user's mistakes, a traceback for everybody else's."""

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import ray

from ray_jobs.cli import app, main
from tavlad.errors import UserError


def _fail_in_numpy() -> None:
    np.zeros(3).reshape(2, 2)


def _fail_by_the_user() -> None:
    raise UserError("stage1.lr = -1: must be above 0")


@ray.remote
def _in_a_task(fail: Any) -> None:
    fail()


def _fail_in_a_task_of_the_user() -> None:
    ray.get(_in_a_task.remote(_fail_by_the_user))


def _fail_in_a_task_of_numpy() -> None:
    ray.get(_in_a_task.remote(_fail_in_numpy))


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Generator[Any]:
    """Calls a verb that does this: the exit code, and what was said on stderr."""
    verbs = list(app.registered_commands)

    def call(verb: Any) -> tuple[Any, str]:
        app.command("fail")(verb)
        with pytest.raises(SystemExit) as ended:
            main(["fail"])
        return ended.value.code, capsys.readouterr().err

    yield call
    app.registered_commands[:] = verbs


@pytest.fixture(scope="module")
def tasks() -> Generator[None]:
    """A Ray of this process."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_mistake_of_the_user_is_one_sentence(said: Any) -> None:
    assert said(_fail_by_the_user) == (2, "error: stage1.lr = -1: must be above 0\n")


def test_the_traceback_of_a_mistake_of_the_user_is_there_for_who_asks(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAVLAD_TRACEBACK", "1")
    code, text = said(_fail_by_the_user)
    assert code == 2
    assert "in _fail_by_the_user" in text
    assert text.endswith("\nerror: stage1.lr = -1: must be above 0\n")


def test_a_value_error_of_a_library_keeps_its_traceback_and_says_where_to_report_it(said: Any) -> None:
    code, text = said(_fail_in_numpy)
    assert code == 1
    traceback, _, report = text.partition("\nerror: ")
    assert traceback.startswith("Traceback")
    assert "in _fail_in_numpy" in traceback
    assert traceback.endswith("ValueError: cannot reshape array of size 3 into shape (2,2)")
    assert "report it with this traceback" in report
    assert "tavlad fail" in report, "the command"
    for package in ("tavlad 0.", "Python 3.", f"ray {ray.__version__}"):
        assert package in report


@pytest.mark.slow
def test_what_a_task_raises_is_told_as_if_it_were_raised_here(tasks: None, said: Any) -> None:
    assert said(_fail_in_a_task_of_the_user) == (2, "error: stage1.lr = -1: must be above 0\n")
    code, text = said(_fail_in_a_task_of_numpy)
    assert code == 1
    assert "in _fail_in_numpy" in text, "the task's own traceback"
    assert "report it with this traceback" in text


def test_an_interrupted_verb_says_how_to_go_on(said: Any) -> None:
    assert said(_interrupt) == (130, "stopped; to go on, run: tavlad fail\n")
