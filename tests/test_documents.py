"""Commands in the documents can be parsed and name files that are here, and the guide's path is walked."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import typer.main

from infra.site import Site
from ray_jobs.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_OURS = re.compile(r"^(infra|ray_jobs|tests|benchmarks|docs)/[\w./-]+$")


def commands_of(document: Path) -> Iterator[list[str]]:
    """The words of each line of the document's blocks, comments left out."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("tavlad ", "make ", "ray ", "kubectl ", "docker ", "aws ", "python ")):
                yield shlex.split(line, comments=True)


ALL = [(document.name, words) for document in DOCUMENTS for words in commands_of(document)]


def words_of(values: list[tuple[str, list[str]]]) -> list[str]:
    return [f"{name}: {' '.join(words)}"[:70] for name, words in values]


VERBS = [(name, words) for name, words in ALL if words[0] == "tavlad" and not words[1].endswith("/")]


@pytest.mark.parametrize(("name", "words"), VERBS, ids=words_of(VERBS))
def test_verb_in_a_document_can_be_parsed(name: str, words: list[str]) -> None:
    command, arguments = typer.main.get_command(app), words[1:]
    context = command.make_context("tavlad", arguments)
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, list(arguments), parent=context)


def test_targets_modules_and_files_in_documents_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(ALL) > 40, "the documents' commands were not found"
    for name, words in ALL:
        if words[0] == "make" and "=" not in words[1]:
            assert words[1] in targets, f"{name}: make {words[1]}"
        for word in words:
            if _OURS.match(word):
                assert (ROOT / word).exists(), f"{name}: {word}"
        for module in [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]:
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{name}: {module}"


@pytest.mark.long
def test_newcomer_who_follows_the_guide_gets_a_model(local_site: Site, shared_data: Path, tmp_path: Path) -> None:
    """The commands of "Your own videos" to the letter; only the clips' names are those of these clips."""
    videos = tmp_path / "my_videos"
    shutil.copytree(shared_data / "ut_interaction" / "videos", videos)
    clip = min(path.relative_to(tmp_path).as_posix() for path in videos.rglob("*.avi"))
    text = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8")
    section = text[text.index("## Your own videos") : text.index("## HMDB51")]
    guide = tmp_path / "guide.md"
    guide.write_text(section)
    commands = list(commands_of(guide))
    assert [words[1] for words in commands] == ["pack", "train", "models", "predict", "attention", "pull"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for words in commands:
        literal = [clip if word == "my_videos/hug/clip1.mp4" else word for word in words]
        done = subprocess.run(literal, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (literal, done.stdout, done.stderr)
    client = mlflow.MlflowClient(local_site.mlflow_uri)
    assert client.get_model_version_by_alias("tavlad-mine-split1", "best").version == "1"
    assert (tmp_path / "model").is_dir()
