"""Names of KV policies. A file that decorates its class with ``@policy("name")`` is all a new policy takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from streamdiff_core.config import CacheConfig
from streamdiff_core.types import KVPolicy

POLICIES: dict[str, type] = {}


def policy(name: str) -> Callable[[type], type]:
    """Class decorator: register a dataclass whose first field is ``config`` and whose other fields are its knobs."""

    def register(cls: type) -> type:
        if name in POLICIES and POLICIES[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"there is a policy {name!r} already: {POLICIES[name].__qualname__}")
        POLICIES[name] = cls
        return cls

    return register


def make_policy(name: str, cache: CacheConfig, options: Mapping[str, Any] | None = None) -> KVPolicy:
    """The policy ``name`` with a cache configuration and its own knobs.

    Raises:
        ValueError: unknown policy or knob, or values that cannot work; one sentence each.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    knobs = {f.name: f.default for f in fields(POLICIES[name]) if f.name != "config"}
    for knob, value in (options or {}).items():
        if knob not in knobs:
            raise ValueError(f"policy {name!r} has no knob {knob!r}; it has: {', '.join(knobs) or 'none'}")
        if not _same_kind(value, knobs[knob]):
            raise ValueError(f"policy knob {knob!r} takes values like {knobs[knob]!r}, got {value!r}")
    return POLICIES[name](cache, **(options or {}))


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a value may replace a default: its type, whole numbers where numbers go, lists of lists for tuples."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(isinstance(v, list | tuple) for v in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
