"""The README is true: its tree is the tree, its verbs are the command's."""

import re
from pathlib import Path

import typer.main

from ray_jobs.cli import app

ROOT = Path(__file__).parents[1]
ROOMS = ("tavlad", "shards", "ray_jobs", "infra")


def test_tree_names_every_module_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\ntavlad/ .*?^```$", text, re.MULTILINE | re.DOTALL)
    listed: set[str] = set()
    room = ""
    for line in tree.splitlines()[1:-1]:
        name, clause = line.split(maxsplit=1)
        assert clause
        if name.endswith("/"):
            room = name
        else:
            listed.add(room + name)
    present = {f"{room}/{path.name}" for room in ROOMS for path in (ROOT / room).glob("*.py")}
    assert listed == {path for path in present if not path.endswith("__init__.py")}


def test_every_verb_is_in_the_table_and_has_an_example_in_its_help() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert re.search(rf"`(tavlad )?{name}\b", text), f"the README does not name the verb {name}"
        assert f"tavlad {name}" in command.help or f"--json {name}" in command.help, f"{name} --help has no example"


def test_first_screen_says_what_is_not_shown() -> None:
    first = " ".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "Nothing has been trained on HMDB51 or UCF101 yet" in first
    assert "In none of our comparisons did the paper's attention help" in first
