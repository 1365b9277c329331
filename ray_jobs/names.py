"""The fingerprint that trainings and sweeps are named by: what decides their result, and nothing else.

A field with the value that names.toml gives it is left out of the name, so that a field added later renames nothing.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TABLES = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
_FIRST: dict[str, Any] = _TABLES["first"]
LEFT_OUT: dict[str, Any] = _FIRST | _TABLES["later"]
"""Every field that decides a result, by its dotted name, and its value that names leave out."""


def fingerprint(fields: Mapping[str, Any], facts: dict[str, str | int]) -> str:
    """64 hex digits of the fields that a name holds, and of facts such as the set and the split."""
    return _digest({name: value for name, value in fields.items() if value != LEFT_OUT[name]} | facts)


def first_fingerprint(fields: Mapping[str, Any], facts: dict[str, str | int]) -> str | None:
    """That of the first names, which held every field there was; None for what they could not say."""
    if any(name not in _FIRST and value != LEFT_OUT[name] for name, value in fields.items()):
        return None
    return _digest({name: fields.get(name, value) for name, value in _FIRST.items()} | facts)


def _digest(decisive: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
