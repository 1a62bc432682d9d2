"""States of models whose parameters have got other names: what is remembered goes along.

A hook that was registered by hand knows of no model and makes names up; `wrap` knows the real ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

MADE_UP = "parameter{}"
# of a tensor or of what stands beside it: NAME|reduced, NAME|MEMORY
LABEL = re.compile(r"(parameter\d+)(\|.*)?", re.DOTALL)


def renamed(
    state: Mapping[str, Any], names: Mapping[str, str], known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """A state of `ranked` by new names, and the names of what is left out of it.

    Args:
        names: the new ones by the old ones.
        known: all that the model has; other names that were made up are nobody's.
    """
    lost: dict[str, None] = {}

    def of(label: str) -> str | None:
        found = LABEL.fullmatch(label)
        if found is None:
            return label
        name, rest = found[1], found[2] or ""
        if name not in names and name not in known:
            lost[name] = None
            return None
        return names.get(name, name) + rest

    def walk(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(walk, value))
        if not isinstance(value, Mapping):
            return value
        return {new: walk(v) for k, v in value.items() if (new := of(k)) is not None}

    return walk(state), list(lost)
