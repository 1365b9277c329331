"""What is sent to a cluster for a verb: our code, the small files it names, its arguments, and a name for all that."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_jobs.provenance import COMMIT_FILE, PACKAGES, ROOT, Code, commit_text, sources, this_code
from ray_jobs.recipe import is_local_file, is_place, load_recipe, parse_change, read_toml, recipe_values
from tavlad.errors import UserError

SUBMITTED = frozenset({"pack", "verify", "codebook", "features", "train", "tune", "evaluate", "register", "reproduce"})
"""The verbs that another site's cluster does as a job; all others are done where they are called."""
_INPUTS = ("recipe", "splits", "space")
"""Arguments whose local files travel with the job."""
_NOT_WHAT_IT_DOES = ("recipe", "change", "dataset", "at_once", "workers_per_trial", "resume_with_new_code")
"""Arguments that are not part of a job's name as they stand: a recipe's part is what it says; the others are the pace,
or a leave that only the first attempt needs."""
_MAX_INPUT_BYTES = 20_000_000
_IDENTITY_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """A verb as a job."""

    verb: str
    arguments: tuple[str, ...]
    """What follows the verb, with the files that travel named as the job finds them."""
    inputs: Mapping[str, Path]
    """Path in the job's working folder -> file of this machine."""
    code: Code = field(default_factory=this_code)
    """What does it."""
    name: str
    """Such as "tavlad-train-1a2b3c4d5e6f": the same for whatever does the same on the same bucket, by the same code."""

    def command(self, site_name: str, json_output: bool) -> str:
        """The job's entrypoint."""
        options = ["--site", site_name, *(["--json"] if json_output else [])]
        return shlex.join(["python", "-m", "ray_jobs.cli", *options, self.verb, *self.arguments])


def make_parcel(
    verb: str, arguments: Sequence[str], values: Mapping[str, Any], bucket: str, code: Code | None = None
) -> Parcel:
    """The parcel of a verb called with these words, which mean these values, done by this code.

    Raises ValueError for a local path that the cluster would not find.
    """
    code = code or this_code()
    inputs: dict[str, Path] = {}
    renamed: dict[str, str] = {}
    identity = {name: value for name, value in values.items() if name not in _NOT_WHAT_IT_DOES}
    for name in _INPUTS:
        if (given := _input(name, values)) is not None:
            files = _files(given)
            identity[name] = _digest(files)
            place = f"inputs/{name}/{given.name}"
            inputs |= {f"{place}/{path}" if path else place: file for path, file in files.items()}
            renamed[str(given)] = place
    for what, place, remedy in _places(values):
        if "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"{what} is on this machine, and {verb} is done by the cluster: give an absolute path that all its "
                f"nodes see{remedy}"
            )
    if verb == "reproduce" and values.get("to") is None:
        raise UserError("reproduce is done by the cluster: give --to an absolute path that outlives the job")
    if "recipe" in values:
        recipe = load_recipe(values["recipe"], values["change"], values["dataset"])
        identity["recipe"] = recipe.fingerprint(dataset=recipe.dataset)
    else:
        identity |= {name: values[name] for name in ("change", "dataset") if name in values}
    text = json.dumps([verb, bucket, identity, code.sources], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_IDENTITY_DIGITS]
    return Parcel(
        verb=verb,
        arguments=tuple(_renamed(word, renamed) for word in arguments),
        inputs=inputs,
        code=code,
        name=f"tavlad-{verb}-{digest}",
    )


def _input(name: str, values: Mapping[str, Any]) -> Path | None:
    """The file or folder of this machine that travels as this argument. A recipe's name is no file, whatever lies in
    the current folder."""
    value = values.get(name)
    if value is None or (name == "recipe" and Path(value).suffix != ".toml"):
        return None
    return given if (given := Path(value)).exists() else None


def _places(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the verb is told by its place, which the cluster must see: as an error names it, the place, another way."""
    store, registered = ", or an s3:// URI", ", or the name of a registered model"
    for name, value in values.items():
        if isinstance(value, Path) and _input(name, values) is None:
            yield str(value), str(value), ""
    if isinstance(to := values.get("to"), str):
        yield f"--to {to}", to, store
    fused = [pair.rpartition("=") for pair in values.get("also") or []]
    for model in [values.get("model"), *(model for model, _, _ in fused)]:
        if model is not None and Path(model).is_dir():
            yield f"the model {model}", model, registered
    recipe = recipe_values(values["recipe"], values["change"], values["dataset"]) if "recipe" in values else {}
    sets = [recipe.get("dataset", values.get("dataset")), *values.get("datasets", []), *(each for _, _, each in fused)]
    for each in sets:
        if isinstance(each, str) and is_place(each):
            yield f"the set {each}", each, store
    for weights in filter(is_local_file, _weights(recipe, values)):
        yield f"model.weights {weights}", weights, store


def _weights(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> list[Any]:
    """All that `model.weights` is: in the recipe, in the changes of several recipes, and in a sweep's space."""
    tables = [recipe] if recipe else []
    if (space := _input("space", values)) is not None:
        tables.append(read_toml(space))
    found = [table["model"].get("weights") for table in tables if isinstance(table.get("model"), dict)]
    if not recipe:
        changes = [parse_change(change) for change in values.get("change") or []]
        found += [value for key, value in changes if key.endswith("model.weights")]
    return [each for value in found for each in (value if isinstance(value, list) else [value])]


def fill_working_folder(parcel: Parcel, folder: Path) -> None:
    """Writes what the job's working folder holds: our packages' sources and tables, and the inputs; nothing else."""
    tables = [file for package in PACKAGES for file in (ROOT / package).rglob("*.toml")]
    for source in (*sources().values(), *tables):
        _copy(source, folder / source.relative_to(ROOT))
    (folder / "ray_jobs" / COMMIT_FILE).write_text(commit_text(parcel.code))
    for place, source in parcel.inputs.items():
        _copy(source, folder / place)


def _files(given: Path) -> dict[str, Path]:
    """Path below `given` -> file; the path is empty for a file itself."""
    if given.is_file():
        found = {"": given}
    else:
        found = {path.relative_to(given).as_posix(): path for path in sorted(given.rglob("*")) if path.is_file()}
    if sum(path.stat().st_size for path in found.values()) > _MAX_INPUT_BYTES:
        raise UserError(f"{given} is larger than {_MAX_INPUT_BYTES // 1_000_000} MB: it does not travel with a job")
    return found


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape") + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _renamed(word: str, renamed: Mapping[str, str]) -> str:
    """The word with the path that travels, however it is written ("./a.toml"), as the job finds it."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and value and str(Path(value)) in renamed:
        return f"{option}={renamed[str(Path(value))]}"
    return renamed.get(str(Path(word)), word) if word else word


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
