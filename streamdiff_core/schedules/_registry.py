"""Names of schedules. A file that decorates its class with ``@schedule("name")`` is all a new schedule takes.

A class is built as ``cls(stepper, num_steps, **knobs)``: its keyword-only arguments are its knobs, plain JSON values.
``clean_pass`` among them says that it can rewrite the cache with clean latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from streamdiff_core.schedules.steps import Stepper
from streamdiff_core.types import DenoiseSchedule

SCHEDULES: dict[str, type] = {}


def schedule(name: str) -> Callable[[type], type]:
    """Class decorator: register a schedule."""

    def register(cls: type) -> type:
        if name in SCHEDULES and SCHEDULES[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"there is a schedule {name!r} already: {SCHEDULES[name].__qualname__}")
        SCHEDULES[name] = cls
        return cls

    return register


def knobs_of(cls: type) -> dict[str, Any]:
    """Keyword-only arguments of a schedule and their defaults."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_schedule(
    name: str, stepper: Stepper, num_steps: int, *, clean_pass: bool = False, options: Mapping[str, Any] | None = None
) -> DenoiseSchedule:
    """The schedule ``name``, empty.

    Raises:
        ValueError: unknown schedule or knob, a value that a knob does not take, or a combination without meaning.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(sorted(SCHEDULES))}")
    if not isinstance(options or {}, Mapping):
        raise ValueError(f"schedule_options must map knobs to values, got {options!r}")
    knobs, given = knobs_of(SCHEDULES[name]), dict(options or {})
    offers_clean_pass = knobs.pop("clean_pass", None) is not None
    for knob, value in given.items():
        if knob not in knobs:
            raise ValueError(f"schedule {name!r} has no knob {knob!r}; it has: {', '.join(knobs) or 'none'}")
        if knobs[knob] is not None and not _same_kind(value, knobs[knob]):
            raise ValueError(f"schedule knob {knob!r} takes values like {knobs[knob]!r}, got {value!r}")
    if clean_pass and not offers_clean_pass:
        offering = ", ".join(sorted(n for n, cls in SCHEDULES.items() if "clean_pass" in knobs_of(cls)))
        raise ValueError(f"schedule {name!r} has no clean_pass to switch on; use one of {offering}")
    if offers_clean_pass:
        given["clean_pass"] = clean_pass
    return SCHEDULES[name](stepper, num_steps, **given)


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a value may replace a default: the same type, and whole numbers where numbers go."""
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
