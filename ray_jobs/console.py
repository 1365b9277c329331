"""What a person sees of a verb: sentences, progress with the time left, tables; and one JSON document for scripts."""

import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.box
import rich.console
import rich.live
import rich.markup
import rich.progress
import rich.table

_SECONDS_BETWEEN_LINES = 10.0
_COLUMNS_OF_A_FILE = 160

Advance = Callable[[int, str], None]
"""Told how much is done, and a note such as the current accuracy."""


class Console:
    """Text goes to stdout, or to stderr when stdout is kept for the JSON document."""

    def __init__(self, *, json_output: bool = False) -> None:
        self._json_output = json_output
        self._console = rich.console.Console(stderr=json_output, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = _COLUMNS_OF_A_FILE

    def say(self, text: str) -> None:
        """One plain sentence."""
        self._console.print(rich.markup.escape(text))

    def heading(self, text: str) -> None:
        """The name of the step that begins."""
        self._console.print(f"[bold]{rich.markup.escape(text)}[/bold]")

    @property
    def is_terminal(self) -> bool:
        """Whether a person may be watching."""
        return self._console.is_terminal

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A table; numbers are formatted by the caller."""
        self._console.print(_table(columns, rows, title))

    @contextmanager
    def live_table(self) -> Generator[Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]]:
        """On a terminal, a table that is drawn anew whenever it is given title, columns and rows; elsewhere nothing."""
        if not self.is_terminal:
            yield lambda title, columns, rows: None
            return
        with rich.live.Live(console=self._console, auto_refresh=False) as live:
            yield lambda title, columns, rows: live.update(_table(columns, rows, title), refresh=True)

    def result(self, document: dict[str, Any]) -> None:
        """The verb's result as the last line of stdout, when JSON was asked for."""
        if self._json_output:
            print(json.dumps(document, ensure_ascii=False), flush=True)  # noqa: T201

    @contextmanager
    def progress(self, label: str, total: int) -> Generator[Advance]:
        """A bar with the time left on a terminal, a line now and then elsewhere."""
        if self._console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(label, total=total, note="")
                yield lambda done, note="": bar.update(task, completed=done, note=note)
        else:
            yield self._lines(label, total)

    def _bar(self) -> rich.progress.Progress:
        return rich.progress.Progress(
            rich.progress.TextColumn("  {task.description}"),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("[dim]{task.fields[note]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("[dim]ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
        )

    def _lines(self, label: str, total: int) -> Advance:
        started = last = time.monotonic()
        began: tuple[float, int] | None = None  # when the first things were done, and how many: starting up is no rate

        def advance(done: int, note: str = "") -> None:
            nonlocal last, began
            now = time.monotonic()
            began = began or ((now, done) if done else None)
            if done < total and now - last < _SECONDS_BETWEEN_LINES:
                return
            last = now
            if done >= total:
                left = f"{now - started:.0f} s"
            elif began is None or done == began[1]:
                left = "time left unknown"
            else:
                left = f"{(now - began[0]) / (done - began[1]) * (total - done):.0f} s left"
            self.say(f"  {label}: {done}/{total}, {left}" + (f", {note}" if note else ""))

        return advance


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> rich.table.Table:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(rich.markup.escape, row))
    return table
