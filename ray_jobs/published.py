"""The paper's numbers, read from published.toml: what `reproduce` runs and what it is compared with."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tavlad.config import Modality

Paper = Literal["hmdb51", "ucf101"]

_FILE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """One row of a table of the paper."""

    name: str
    recipe: str | None
    """Ours that runs it; None for a row that is quoted only, or fused."""
    backbone: str
    ours: str
    """Our trunk and what differs, where it is not the row's own; empty otherwise."""
    modality: Modality
    """Of the set that it is trained on: "flow" is trained on the set NAME-flow."""
    fuses: tuple[str, ...]
    """Recipes of rows whose scores this row averages; it has no training of its own."""
    accuracy: dict[str, float]
    """In %, by data set: of split 1 in Table 1, the average of the splits in Table 2."""
    splits: dict[str, list[float]]
    """In %, by data set, of each split where the paper gives them."""


def published_table(number: Literal[1, 2]) -> list[PublishedRow]:
    """The rows of Table 1 or 2, in the order of the report."""
    values = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return [_row(row) for row in values[f"table{number}"]]


def paper_set(dataset: str) -> Paper | None:
    """The paper's data set that a set is by its name; None for any other, which the paper says nothing of."""
    for name in ("hmdb51", "ucf101"):
        if dataset.lower().replace("-", "").replace("_", "").startswith(name):
            return name
    return None


def _row(values: dict[str, Any]) -> PublishedRow:
    accuracy: dict[str, float] = {}
    splits: dict[str, list[float]] = {}
    for dataset in ("hmdb51", "ucf101"):
        if dataset in values:
            given = values[dataset]
            accuracy[dataset] = given[0] if isinstance(given, list) else given
            splits[dataset] = given if isinstance(given, list) else values.get(f"{dataset}_splits", [])
    return PublishedRow(
        name=values["name"],
        recipe=values.get("recipe"),
        backbone=values.get("backbone", "ResNet-34"),
        ours=values.get("ours", ""),
        modality=values.get("modality", "rgb"),
        fuses=tuple(values.get("fuses", ())),
        accuracy=accuracy,
        splits=splits,
    )
