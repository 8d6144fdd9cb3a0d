"""JSON as its standard has it, which knows no NaN and no infinity: what every file and line of ours is written by."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for a figure that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # there is one
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The same plain values, with None for a figure that is not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
