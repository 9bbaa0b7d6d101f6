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
    knobs = [f.name for f in fields(POLICIES[name]) if f.name != "config"]
    for knob in options or {}:
        if knob not in knobs:
            raise ValueError(f"policy {name!r} has no knob {knob!r}; it has: {', '.join(knobs) or 'none'}")
    return POLICIES[name](cache, **(options or {}))
