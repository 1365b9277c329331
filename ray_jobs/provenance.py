"""Which code this is, which code made what is there, and what follows where the two differ."""

import functools
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shards.store import Store
from tavlad.errors import UserError

PACKAGES = ("tavlad", "shards", "ray_jobs", "infra")
ROOT = Path(__file__).resolve().parents[1]
COMMIT_FILE = "commit.txt"
"""In `ray_jobs` of what is no checkout, a job's folder or an image: the commit, with "-dirty" behind it if need be."""

OtherCode = Literal["refuse", "go on", "begin anew"]
"""What to do with what other code made: refuse what it did not end, go on with that, or begin anew beside all of it."""

_UNKNOWN, _DIRTY = "unknown", "-dirty"
_ANEW = "begun_anew.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A version of our code. Two are the same if their sources are: a commit may change other files alone."""

    commit: str = _UNKNOWN
    is_dirty: bool | None = None
    """Whether the sources are not those of the commit; None if that is not known."""
    sources: str = _UNKNOWN
    """SHA-256 of the packages' sources."""

    def __str__(self) -> str:
        if self.sources == _UNKNOWN:
            return "a version that did not record its code"
        commit = self.commit if self.commit == _UNKNOWN else self.commit[:10]
        return f"commit {commit}{_DIRTY if self.is_dirty else ''}, sources {self.sources[:10]}"


Codes = tuple[Code, ...]
"""The versions that made something, one after the other; none of what is not begun."""
UNKNOWN_CODE = Code()
"""That of what was made before the code was recorded: certainly not this one."""


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Path below `root` -> file, of every source of our packages."""
    files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return {file.relative_to(root).as_posix(): file for file in files if not file.name.startswith(".")}


def digest_of_sources(root: Path = ROOT) -> str:
    """The same wherever the same sources lie, a checkout, a job's folder or an image, whatever ends their lines."""
    digest = hashlib.sha256()
    for name, file in sources(root).items():
        content = hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


@functools.cache
def this_code(root: Path = ROOT) -> Code:
    """The code of this process, as it lay on disk when this was first asked."""
    text = _ask_git(root) or _told(root)
    is_dirty = None if text == _UNKNOWN else text.endswith(_DIRTY)
    return Code(commit=text.removesuffix(_DIRTY), is_dirty=is_dirty, sources=digest_of_sources(root))


def commit_text(code: Code) -> str:
    """What COMMIT_FILE holds."""
    return code.commit + (_DIRTY if code.is_dirty else "")


def _told(root: Path) -> str:
    file = root / "ray_jobs" / COMMIT_FILE
    return (file.read_text(encoding="utf-8").strip() if file.is_file() else "") or _UNKNOWN


def _ask_git(root: Path) -> str | None:
    """The checkout's commit; None outside one. A folder within somebody else's checkout is none of ours."""
    git = ["git", "--no-optional-locks", "-C", str(root)]
    status = ["status", "--porcelain=v2", "--branch", "--untracked-files=all", "--"]
    try:
        _said([*git, "ls-files", "--error-unmatch", "tavlad/__init__.py"])
        lines = _said([*git, *status, *(f":(glob){package}/**/*.py" for package in PACKAGES)]).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    (commit,) = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    is_dirty = any(not line.startswith("#") for line in lines)
    return commit + (_DIRTY if is_dirty else "") if commit != "(initial)" else None


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def recorded(codes: Codes) -> list[dict[str, Any]]:
    """The versions as JSON."""
    return [asdict(each) for each in codes]


def codes_of(values: Any) -> Codes:
    """The versions that `recorded` gave; the unknown one for what holds none."""
    return tuple(Code(**each) for each in values) if values else (UNKNOWN_CODE,)


def is_own(codes: Codes) -> bool:
    """Whether all of it was made by this code."""
    return bool(codes) and {each.sources for each in codes} == {this_code().sources}


def code_tags(codes: Codes) -> dict[str, str]:
    """Tags of a run or a registered version: the code that ended it, and before that, if any, what began it."""
    last = codes[-1]
    dirty = {None: _UNKNOWN, True: "true", False: "false"}[last.is_dirty]
    tags = {"git": last.commit, "git_dirty": dirty, "sources_sha256": last.sources}
    return tags | ({"earlier_code": "; ".join(map(str, codes[:-1]))} if len(codes) > 1 else {})


def described(codes: Codes) -> str:
    """The versions in words."""
    return ", then ".join(map(str, codes))


def label(codes: Codes) -> str:
    """What is said of something finished that is found again: nothing if this code made it."""
    if is_own(codes):
        return ""
    return f"made by other code, which --fresh leaves aside: {described(codes)}; this is {this_code()}"


def with_this_code(name: str, codes: Codes, other_code: OtherCode) -> Codes:
    """The versions that will have made it once this code goes on with what was cut off. UserError if they would differ
    and nobody asked for that."""
    if not codes or codes[-1].sources == this_code().sources:
        return codes or (this_code(),)
    if other_code == "go on":
        return (*codes, this_code())
    raise UserError(
        f"{name} was cut off, and other code began it ({described(codes)}; this is {this_code()}): add "
        "--resume-with-new-code to go on with it, or --fresh to begin anew and leave it as it is"
    )


def name_in_use(store: Store, name: str, codes_under: Callable[[str], Codes], other_code: OtherCode) -> str:
    """The name under which `store` has, or will have, what `name` stands for.

    What is begun anew gets ".2", ".3" ... behind the name, so that nothing is deleted and nothing mixed, in the store
    and in MLflow. Of several, this code's own is meant, else the newest. Begun anew twice by one code it is one.
    """
    path = f"{name}/{_ANEW}"
    names: list[str] = [name, *(json.loads(store.read(path)) if store.exists(path) else [])]
    if len(names) == 1 and other_code != "begin anew":
        return name
    own = [each for each in names if is_own(codes_under(each))]
    if own or other_code != "begin anew" or not codes_under(names[-1]):
        return (own or names)[-1]
    names.append(f"{name}.{len(names) + 1}")
    store.write(path, json.dumps(names[1:]).encode())
    return names[-1]


def first_that_exists(store: Store, names: Sequence[str | None]) -> str:
    """The first of these names that `store` has anything under, else the first."""
    known = [name for name in names if name is not None]
    return next((name for name in known if store.list(f"{name}/")), known[0])


def short(name: str) -> str:
    """The end of a training's or sweep's name, short enough for a legend: "1a2b3c", or "1a2b3c.2"."""
    digits, dot, again = name.rpartition("-")[2].partition(".")
    return digits[:6] + dot + again


def provenance_codes(provenance: Mapping[str, Any]) -> Codes:
    """The versions that a model's card names."""
    return codes_of(provenance.get("code"))
