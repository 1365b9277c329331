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
