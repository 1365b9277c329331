"""Which code made what: the same digest wherever the same sources lie, and what follows from another one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_jobs import provenance
from ray_jobs.job_parcel import fill_working_folder, make_parcel
from ray_jobs.provenance import (
    COMMIT_FILE,
    UNKNOWN_CODE,
    Code,
    Codes,
    OtherCode,
    code_tags,
    codes_of,
    commit_text,
    digest_of_sources,
    label,
    name_in_use,
    recorded,
    short,
    this_code,
    with_this_code,
)
from shards.store import open_store

ROOT = Path(__file__).parents[2]
OTHER = Code(commit="b" * 40, is_dirty=True, sources="2" * 64)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small source tree of our packages."""
    root = tmp_path / "tree"
    for package in provenance.PACKAGES:
        (root / package / "wing").mkdir(parents=True)
        (root / package / "__init__.py").write_text('"""Ours."""\n')
        (root / package / "wing" / "part.py").write_text(f"NAME = {package!r}\n")
    return root


def _git(root: Path, *words: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.autocrlf=false"]
    return subprocess.run(
        ["git", *settings, "-C", str(root), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tree: Path) -> Path:
    """The same, committed."""
    _git(tree, "init", "--quiet")
    (tree / "README.md").write_text("read me\n")
    _git(tree, "add", ".")
    _git(tree, "commit", "--quiet", "--message", "all")
    this_code.cache_clear()
    return tree


def _edit(root: Path) -> None:
    (root / "shards" / "wing" / "part.py").write_text("NAME = 'another'\n")


def _add(root: Path) -> None:
    (root / "shards" / "wing" / "more.py").write_text("")


def _move(root: Path) -> None:
    (root / "shards" / "wing" / "part.py").rename(root / "shards" / "wing" / "other.py")


@pytest.mark.parametrize("change", [_edit, _add, _move])
def test_digest_and_dirtiness_follow_the_sources(checkout: Path, change: Callable[[Path], None]) -> None:
    before = this_code(checkout)
    assert (before.commit, before.is_dirty) == (_git(checkout, "rev-parse", "HEAD"), False)
    change(checkout)
    this_code.cache_clear()
    after = this_code(checkout)
    assert (after.commit, after.is_dirty) == (before.commit, True)
    assert after.sources != before.sources


def test_what_is_no_source_and_how_lines_end_change_nothing(checkout: Path) -> None:
    before = this_code(checkout)
    (checkout / "tavlad" / "__pycache__").mkdir()
    (checkout / "tavlad" / "__pycache__" / "part.cpython-311.pyc").write_bytes(b"compiled")
    (checkout / "infra" / "lab.toml").write_text("mine = true\n")
    (checkout / "notes.py").write_text("scribbles = 1\n")
    (checkout / "README.md").write_text("changed\n")
    this_code.cache_clear()
    assert this_code(checkout) == before
    for file in checkout.rglob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert digest_of_sources(checkout) == before.sources


def test_folder_within_somebody_elses_checkout_has_no_commit_of_theirs(tree: Path) -> None:
    outer = tree.parent
    _git(outer, "init", "--quiet")
    (outer / "theirs").write_text("theirs")
    _git(outer, "add", "theirs")
    _git(outer, "commit", "--quiet", "--message", "theirs")
    this_code.cache_clear()
    code = this_code(tree)
    assert (code.commit, code.is_dirty, code.sources) == ("unknown", None, digest_of_sources(tree))


@pytest.mark.parametrize(("text", "dirty"), [("a" * 40, False), ("a" * 40 + "-dirty", True), ("unknown", None)])
def test_commit_baked_into_an_image_is_told_where_there_is_no_git(tree: Path, text: str, dirty: bool | None) -> None:
    (tree / "ray_jobs" / COMMIT_FILE).write_text(f"{text}\n")
    this_code.cache_clear()
    code = this_code(tree)
    assert (code.commit, code.is_dirty) == (text.removesuffix("-dirty"), dirty)
    assert commit_text(code) == text


_SAY = "import json; from ray_jobs.provenance import *; print(json.dumps(recorded((this_code(),))))"


def _said_in(folder: Path) -> Codes:
    done = subprocess.run(
        [sys.executable, "-c", _SAY], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, check=True
    )
    return codes_of(json.loads(done.stdout))


def test_job_has_the_commit_and_the_digest_of_the_code_that_submits_it(tmp_path: Path) -> None:
    parcel = make_parcel("verify", ["mine"], {"dataset": "mine"}, "bucket")
    fill_working_folder(parcel, tmp_path / "job")
    assert not (tmp_path / "job" / ".git").exists()
    assert _said_in(tmp_path / "job") == (this_code(),) == (parcel.code,)


@pytest.mark.slow
def test_installed_packages_have_the_digest_of_the_tree_and_the_commit_they_were_built_with(tmp_path: Path) -> None:
    copy, target = tmp_path / "copy", tmp_path / "installed"
    copy.mkdir()
    for name in (*provenance.PACKAGES, "pyproject.toml", "README.md"):
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copyfile)(place, copy / name)
    (copy / "ray_jobs" / COMMIT_FILE).write_text("c" * 40)
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--python", sys.executable]
    subprocess.run([*uv, "--no-deps", "--no-build-isolation", "--target", target, copy], check=True)
    assert _said_in(target) == (Code(commit="c" * 40, is_dirty=False, sources=this_code().sources),)


def test_cut_off_training_of_other_code_is_refused_with_both_ways_out() -> None:
    ours = this_code()
    assert with_this_code("t", (), "refuse") == (ours,)
    assert with_this_code("t", (OTHER, ours), "refuse") == (OTHER, ours), "asked once is enough"
    assert with_this_code("t", (OTHER,), "go on") == (OTHER, ours)
    for codes, named in [((OTHER,), "commit bbbbbbbbbb-dirty"), ((UNKNOWN_CODE,), "a version that did not record")]:
        with pytest.raises(ValueError, match=rf"t was cut off, .*{named}.* --resume-with-new-code .* --fresh"):
            with_this_code("t", codes, "refuse")


def test_what_is_found_is_labelled_if_other_code_made_it() -> None:
    assert label((this_code(),)) == ""
    assert "commit bbbbbbbbbb-dirty, sources 2222222222" in label((OTHER,))
    assert "did not record its code" in label((UNKNOWN_CODE,))


def test_tags_name_every_version_that_trained_a_model() -> None:
    assert code_tags((OTHER,)) == {"git": "b" * 40, "git_dirty": "true", "sources_sha256": "2" * 64}
    assert code_tags((UNKNOWN_CODE, OTHER)) == code_tags((OTHER,)) | {"earlier_code": str(UNKNOWN_CODE)}
    assert codes_of(json.loads(json.dumps(recorded((UNKNOWN_CODE, OTHER))))) == (UNKNOWN_CODE, OTHER)
    assert codes_of(None) == (UNKNOWN_CODE,)


def test_begun_anew_has_a_name_of_its_own_which_is_found_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    made: dict[str, Codes] = {"set-1a2b3c4d5e": (OTHER,)}

    def name(other_code: OtherCode) -> str:
        return name_in_use(store, "set-1a2b3c4d5e", lambda each: made.get(each, ()), other_code)

    assert name("refuse") == name("go on") == "set-1a2b3c4d5e"
    assert name("begin anew") == "set-1a2b3c4d5e.2"
    assert name("begin anew") == name("refuse") == "set-1a2b3c4d5e.2", "the newest, which this code is to make"
    made["set-1a2b3c4d5e.2"] = (this_code(),)
    assert name("begin anew") == name("refuse") == "set-1a2b3c4d5e.2", "begun anew twice is once"
    made["set-1a2b3c4d5e.2"] = (OTHER, this_code())
    assert name("begin anew") == "set-1a2b3c4d5e.3", "what other code has a part in is not this code's"
    made["set-1a2b3c4d5e"] = (this_code(),)
    assert name("begin anew") == name("refuse") == "set-1a2b3c4d5e", "this code's own goes before newer ones"
    assert [short(each) for each in ("a-1a2b3c4d5e", "a-1a2b3c4d5e.2")] == ["1a2b3c", "1a2b3c.2"]
