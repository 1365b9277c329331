"""What scripts read: with --json the last line of stdout is one JSON document, and nothing else is on stdout."""

import json

import pytest

from ray_jobs.console import Console


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json_output=True)
    console.heading("Step")
    console.table(["a"], [["[not markup]"]])
    with console.progress("clips", 2) as advance:
        advance(1, "")
        advance(2, "done")
    console.result({"name": "ä"})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"name": "ä"}
    assert "Step" in captured.err
    assert "[not markup]" in captured.err


def test_without_a_terminal_progress_is_lines_that_end_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("clips", 3) as advance:
        for done in (1, 2, 3):
            advance(done, "loss 0.1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, "no line for every step"
    assert lines[0].startswith("  clips: 3/3, ")
    assert lines[0].endswith("loss 0.1")


def test_time_left_is_by_the_rate_since_the_first_thing_was_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("ray_jobs.console.time.monotonic", lambda: now[0])
    with Console().progress("clips", 100) as advance:
        for seconds, done in ((30, 0), (60, 20), (75, 30), (90, 60), (110, 100)):  # a minute to start up
            now[0] = seconds
            advance(done, "")
    assert capsys.readouterr().out.splitlines() == [
        "  clips: 0/100, time left unknown",
        "  clips: 20/100, time left unknown",
        "  clips: 30/100, 105 s left",
        "  clips: 60/100, 30 s left",
        "  clips: 100/100, 110 s",
    ]
