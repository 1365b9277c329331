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
_PROGRAMS = ("tavlad ", "make ", "ray ", "kubectl ", "docker ", "aws ", "python ", "openssl ", "sudo ")
_OURS = re.compile(r"^(infra|ray_jobs|tests|benchmarks|docs)/[\w./-]+$")


def commands_of(document: Path) -> Iterator[list[str]]:
    """The words of each line of the document's blocks, comments left out."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(
                ("tavlad ", "make ", "ray ", "kubectl ", "docker ", "aws ", "python ", "openssl ", "sudo ")
            ):
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


def test_no_fault_that_ends_a_training_claims_equal_weights() -> None:
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8"), re.MULTILINE)
    ended = [row for row in rows if "exit code 2" in row and row.count("|") == 6]
    assert len(ended) == 2, "the rows were not found"
    assert not [row for row in ended if re.search(r"\| yes[^|]*\|$", row)], "nothing was there to compare"


_NOT_RUN = {
    "kubectl": "no Kubernetes",
    "docker": "no container runtime",
    "aws": "no cloud account",
    "ray up": "no cloud account",
    "ray dashboard": "no cloud account",
    "resources.gpus_per_worker=1": "no GPU",
    "make audit": "no advisories",
}
"""Words of commands that the machines this is built on cannot run; docs/DEPLOY.md says so too."""
_RUN = {
    "make install": ".ci/run",
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make rehearsal": "docs/LOG.md",
    "sudo sh infra/compose/make_secrets.sh": "tests/infra/test_manifests.py",
    "ray job submit": "tests/ray_jobs/test_end_to_end.py",
    "tavlad site check": "tests/ray_jobs/test_site_check.py",
    "tavlad --site lab": "tests/ray_jobs/test_submit.py",
    "tavlad prepare": "tests/shards/test_published_sets.py",
    "tavlad pack": "tests/fixtures_verbs.py",
    "tavlad features": "tests/ray_jobs/test_end_to_end.py",
    "tavlad reproduce": "tests/ray_jobs/test_end_to_end.py",
    "tavlad evaluate": "tests/ray_jobs/test_end_to_end.py",
    "tavlad serve": "tests/ray_jobs/test_serve.py",
    "tavlad predict": "tests/ray_jobs/test_cli_models.py",
    "tavlad train": "tests/fixtures_verbs.py",
}
"""What all others begin with, and what runs them on other videos; the guide's first part is walked below, as it is."""


def test_every_command_is_run_by_something_or_cannot_be() -> None:
    walked = {" ".join(words) for words in commands_of(ROOT / "docs" / "GUIDE.md") if "mine" in " ".join(words)}
    for name, words in ALL:
        text = f"{' '.join(words)} "
        if text.strip() in walked or text == "tavlad models " or any(f"{each} " in text for each in _NOT_RUN):
            continue
        (proof,) = [file for begin, file in _RUN.items() if text.startswith(f"{begin} ")] or [None]
        assert proof is not None, f"{name}: nothing runs {text!r}, and nothing says why it cannot be run"
        spoken = (ROOT / proof).read_text(encoding="utf-8")
        what = words[3] if words[1:3] == ["--site", "lab"] else words[-1 if words[0] == "sudo" else 1]
        assert what in spoken, f"{name}: {proof} does not run {text!r}"


@pytest.mark.long
@pytest.mark.timeout(1800)  # a sweep of twelve trials is part of it
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
    assert [words[1] for words in commands] == ["pack", "train", "tune", "models", "predict", "attention", "pull"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for words in commands:
        literal = [clip if word == "my_videos/hug/clip1.mp4" else word for word in words]
        done = subprocess.run(literal, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (literal, done.stdout, done.stderr)
    client = mlflow.MlflowClient(local_site.mlflow_uri)
    versions = client.search_model_versions("name='tavlad-mine-split1'")
    assert {each.version for each in versions} == {"1", "2"}  # the training's, and the sweep's best one's
    assert (tmp_path / "model").is_dir()
    assert (tmp_path / "attention" / "attention.png").is_file()
