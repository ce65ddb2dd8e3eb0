"""Numbers out of a config.json, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from kimisys.errors import LayoutError

Number = TypeVar("Number", int, float)


def number(given: Mapping[str, Any], name: str, kind: type[Number]) -> Number:
    """`given[name]` as `kind`. Raises KeyError when it is missing, LayoutError when it is null, a
    word, or whatever else is no number."""
    value = given[name]
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LayoutError(
            f"{name} {value!r} of the configuration is no number: "
            "give the config.json of the checkpoint as it is"
        ) from error
