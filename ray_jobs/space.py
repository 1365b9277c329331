"""What a sweep searches: fields of the recipe with their values or bounds, from a TOML file, checked before it starts.

[stage1]
lr = { low = 1e-4, high = 3e-2, scale = "log" }      # a grid needs `points = 5` here too

[model]
num_clusters = [16, 32, 64, 128]
gru_width = { low = 64, high = 512 }                 # whole numbers, because the field is one
"""

import difflib
import itertools
import json
import math
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ray_jobs.recipe import Recipe, change_recipe
from tavlad.errors import UserError

Changes = dict[str, Any]
"""Fields of a recipe by dotted name, such as {"stage1.lr": 0.003}."""

_WITHOUT_EFFECT = {
    "stage2.": "trials train stage 1 only; change the recipe itself with --set",
    "resources.": "it does not change what is computed",
    "features.budget": "it does not change what is computed",
    "training.evaluate_every": "trials are scored after every epoch",
    "dataset": "trials share one set",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A field with a few values."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A field between two bounds, both included."""

    field: str
    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    whole: bool = False
    """Whether the field is a whole number."""
    points: int = 0
    """Values that a grid takes of it, evenly spaced on the scale; 0: a grid refuses it."""

    def grid(self) -> tuple[float | int, ...]:
        """The values of a grid. ValueError without `points`."""
        if not self.points:
            raise UserError(
                f"{self.field} is a range, and a grid needs values: list them, or add points = 3 to the range"
            )
        at = [step / max(1, self.points - 1) for step in range(self.points)]
        if self.scale == "log":
            values = [float(f"{self.low * (self.high / self.low) ** share:.6g}") for share in at]
        else:
            values = [float(f"{self.low + (self.high - self.low) * share:.6g}") for share in at]
        return tuple(dict.fromkeys(round(value) if self.whole else value for value in values))

    @property
    def ends(self) -> tuple[float | int, ...]:
        """The bounds, as the field's type."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


Dimension = Choice | Range

DEFAULT_SPACE: dict[str, Any] = {
    "stage1": {"lr": {"low": 1e-4, "high": 3e-2, "scale": "log", "points": 3}},
    "model": {"num_clusters": [16, 32, 64, 128], "gru_width": [128, 256, 512]},
}
"""Learning rate, K and U; without those that the recipe's model does not have."""


def load_space(path: Path | None, recipe: Recipe) -> tuple[Dimension, ...]:
    """The dimensions of a space file, or of the default space; each value and bound is tried on the recipe.

    Raises ValueError naming the file and the field for whatever cannot be trained.
    """
    if path is None:
        searched = {name: value for name, value in DEFAULT_SPACE["model"].items() if name not in recipe.model.unused}
        return parse_space(DEFAULT_SPACE | {"model": searched}, recipe)
    if not path.is_file():
        raise UserError(f"the space {path} does not exist: give a TOML file, or leave --space out")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    try:
        return parse_space(values, recipe)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def parse_space(values: Mapping[str, Any], recipe: Recipe) -> tuple[Dimension, ...]:
    """The dimensions that nested tables describe."""
    leaves = _leaves(values, "")
    without_effect = dict(_WITHOUT_EFFECT)
    if "model.temporal" not in dict(leaves):
        why = f'it changes nothing with model.temporal = "{recipe.model.temporal}"'
        without_effect |= {f"model.{field}": why for field in recipe.model.unused}
    dimensions = tuple(_dimension(name, value, recipe, without_effect) for name, value in leaves)
    if not dimensions:
        raise UserError("the space has no dimension: give a field values, such as stage1.lr = [0.001, 0.01]")
    for dimension in dimensions:
        for value in dimension.values if isinstance(dimension, Choice) else dimension.ends:
            changed(recipe, {dimension.field: value})
    return dimensions


def grid(dimensions: tuple[Dimension, ...]) -> list[Changes]:
    """Every combination. ValueError for a range without `points`."""
    values = [each.values if isinstance(each, Choice) else each.grid() for each in dimensions]
    names = [each.field for each in dimensions]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]


def extremes(dimensions: tuple[Dimension, ...]) -> Changes:
    """The largest value of each numeric dimension, and the first of the others."""
    most: Changes = {}
    for each in dimensions:
        values = each.values if isinstance(each, Choice) else each.ends
        is_numeric = all(isinstance(value, (int, float)) for value in values)
        most[each.field] = max(values) if is_numeric else values[0]
    return most


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with fields changed by their dotted names."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        table, _, field = name.partition(".")
        tables.setdefault(table, {})[field] = value
    return change_recipe(recipe, tables)


def as_settings(changes: Changes) -> str:
    """The same as words of `tavlad train`: "--set stage1.lr=0.003 --set model.trunk=resnet18"."""
    texts = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items())
    return " ".join(f"--set {shlex.quote(text)}" for text in texts)


def _leaves(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and not {"low", "high"} & value.keys():
            leaves += _leaves(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _dimension(name: str, value: Any, recipe: Recipe, without_effect: Mapping[str, str]) -> Dimension:
    known = recipe.flat()
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
        raise UserError(f"{name} is no field of a recipe" + (f": did you mean {near[0]}?" if near else ""))
    for prefix, why in without_effect.items():
        if name.startswith(prefix):
            raise UserError(f"{name} cannot be a dimension: {why}")
    if isinstance(value, list):
        values = tuple(cast(list[Any], value))
        if not values or len(set(map(repr, values))) < len(values):
            raise UserError(f"{name} = {value}: list at least one value, none twice")
        return Choice(field=name, values=values)
    if isinstance(value, dict):
        return _range(name, cast(dict[str, Any], value), known[name])
    raise UserError(f"{name} = {value!r}: give a list of values, or {{ low = ..., high = ... }}")


def _range(name: str, value: dict[str, Any], current: Any) -> Range:
    unknown = value.keys() - {"low", "high", "scale", "points"}
    if unknown or not {"low", "high"} <= value.keys():
        raise UserError(f"{name} = {value}: a range has low and high, and maybe scale and points")
    if not _is_number(current):
        raise UserError(f"{name} is not a number: list its values")
    low, high, points = value["low"], value["high"], value.get("points", 0)
    whole = isinstance(current, int)
    if not all(
        _is_number(bound) and math.isfinite(bound) and not (whole and bound != int(bound)) for bound in (low, high)
    ):
        raise UserError(f"{name} = {value}: low and high must be {'whole ' if whole else ''}numbers")
    if not low < high:
        raise UserError(f"{name} = {value}: low must be below high")
    scale = value.get("scale", "linear")
    if scale not in ("linear", "log") or (scale == "log" and low <= 0):
        raise UserError(f'{name} = {value}: scale is "linear", or "log" for bounds above 0')
    if not isinstance(points, int) or isinstance(points, bool) or points < 0:
        raise UserError(f"{name} = {value}: points must be a whole number, at least 1")
    return Range(field=name, low=float(low), high=float(high), scale=scale, whole=whole, points=points)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
