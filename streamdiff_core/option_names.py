"""Options by name and text: ``steps=2``, ``window_frames=5``, ``ema_sink.decay=0.9``, ``inputs=freeze+rcfg``.

A name is a field of ``StreamOptions`` or ``CacheConfig``, ``mechanism.knob`` as ``list_mechanisms()`` names them, or
``inputs`` for the rules of the input side. This is the syntax of ``--set`` and ``--vary``; whether values can work is
``check_options``' business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from streamdiff_core.config import CacheConfig
from streamdiff_core.inputs import INPUTS
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.mechanisms import read_knobs
from streamdiff_core.plain_data import from_plain
from streamdiff_core.schedules import SCHEDULES
from streamdiff_core.stream_options import StreamOptions

ELSEWHERE = ("cache", "width", "height", "mode", "policy_options", "schedule_options", "input_options")
"""Fields that are not one value, or that the input and ``--size`` give."""
OWN_FIELDS = tuple(f.name for f in fields(StreamOptions) if f.name not in ELSEWHERE)
CACHE_FIELDS = tuple(f.name for f in fields(CacheConfig))
NAMED = {"policy": POLICIES, "schedule": SCHEDULES}
"""Options whose value is a name in a registry."""


def parse_setting(text: str) -> tuple[str, Any]:
    """``name=value`` → (name, value); numbers, true, false, null and lists as in JSON, anything else is text.

    Raises:
        ValueError: no ``=``, or an unknown name.
    """
    name, values = parse_variation(text)
    if len(values) != 1:
        join = ", or join rules as in freeze+rcfg" if name == "inputs" else ""
        raise ValueError(f"{text!r} sets {name} to {len(values)} values; give one{join}")
    return name, values[0]


def parse_variation(text: str) -> tuple[str, tuple[Any, ...]]:
    """``name=value,value,…`` → (name, values); commas inside brackets or quotes belong to a value.

    Raises:
        ValueError: no ``=``, an unknown name, a missing value or the same one twice.
    """
    name, found, rest = (part.strip() for part in text.partition("="))
    if not name or not found:
        raise ValueError(f"{text!r} is no setting; write for example policy=sink or ema_sink.decay=0.9")
    values = tuple(_parse_value(part) for part in _split(rest))
    check_setting(name, values)
    return name, values


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Several ``name=value``, each name once.

    Raises:
        ValueError: one that cannot be read, or a name twice.
    """
    found: dict[str, Any] = {}
    for name, value in map(parse_setting, texts):
        if name in found:
            raise ValueError(f"{name} is set twice; leave out one")
        found[name] = value
    return found


def start_with(options: Mapping[str, Any], settings: Mapping[str, Any], cache: CacheConfig) -> dict[str, Any]:
    """``apply_settings`` for a single stream, where a knob without its mechanism is a mistake.

    Raises:
        ValueError: such a knob, or a cache field of the wrong type.
    """
    changed = apply_settings(options, settings, cache)
    if idle := unused_knobs(changed, settings):
        raise ValueError(
            f"{idle[0]} changes nothing: the stream does not use {idle[0].partition('.')[0]}; switch it on"
        )
    return changed


def check_setting(name: str, values: tuple[Any, ...]) -> None:
    """Refuse an unknown name, the name of an unknown mechanism, and repeated or missing values.

    Raises:
        ValueError: one sentence that lists what is known.
    """
    if not values or "" in values:
        raise ValueError(f"{name} needs a value, as in {name}=1")
    if any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"{name} names the same value twice: {', '.join(map(show_value, values))}")
    mechanism, dot, knob = name.partition(".")
    if dot:
        _check_knob(mechanism, knob)
    elif name not in (*OWN_FIELDS, *CACHE_FIELDS, "inputs"):
        known = ", ".join((*OWN_FIELDS, *CACHE_FIELDS, "inputs"))
        raise ValueError(f"unknown setting {name!r}; known: {known}, and knobs as in ema_sink.decay")
    for value in values if name in NAMED else ():
        if not isinstance(value, str) or value not in NAMED[name]:
            raise ValueError(f"unknown {name} {show_value(value)!r}; known: {', '.join(sorted(NAMED[name]))}")
    for value in values if name == "inputs" else ():
        parse_inputs(value)


def apply_settings(options: Mapping[str, Any], settings: Mapping[str, Any], cache: CacheConfig) -> dict[str, Any]:
    """Keyword arguments of ``StreamPipeline.start`` with settings laid over them.

    A knob is set where its mechanism is in use; ``unused_knobs`` tells which are not.

    Args:
        options: keyword arguments so far; of ``policy_options`` and ``schedule_options`` only those are kept whose
            mechanism stays the same.
        cache: configuration whose fields ``options`` does not change.

    Raises:
        ValueError: a cache field of the wrong type.
    """
    changed = dict(options) | {name: value for name, value in settings.items() if name in OWN_FIELDS}
    for name in NAMED:
        if name in settings and settings[name] != options.get(name):
            changed[f"{name}_options"] = {}
    if "inputs" in settings:
        changed["input_options"] = parse_inputs(settings["inputs"])
    cache_changes = {name: value for name, value in settings.items() if name in CACHE_FIELDS}
    if cache_changes:
        changed["cache"] = from_plain(CacheConfig, asdict(options.get("cache") or cache) | cache_changes, "cache")
    for name, value in settings.items():
        mechanism, dot, knob = name.partition(".")
        if dot and mechanism in INPUTS and mechanism in (rules := changed.get("input_options") or {}):
            changed["input_options"] = {**rules, mechanism: {**rules[mechanism], knob: value}}
        for kind in NAMED if dot else ():
            if changed.get(kind) == mechanism:
                changed[f"{kind}_options"] = {**(changed.get(f"{kind}_options") or {}), knob: value}
    return changed


def unused_knobs(options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Knobs in ``settings`` whose mechanism ``options`` do not use."""
    used = {options.get("policy"), options.get("schedule"), *(options.get("input_options") or {})}
    return [name for name in settings if "." in name and name.partition(".")[0] not in used]


def parse_inputs(value: Any) -> dict[str, dict[str, Any]]:
    """``freeze+rcfg`` → {"freeze": {}, "rcfg": {}}; ``none`` → {}.

    Raises:
        ValueError: an unknown rule.
    """
    names = [] if value in ("none", None) else str(value).split("+")
    for name in names:
        if name not in INPUTS:
            raise ValueError(f"unknown input rule {name!r}; known: none, {', '.join(sorted(INPUTS))}")
    return {name: {} for name in names}


def show_value(value: Any) -> str:
    """As it is written in a setting."""
    return value if isinstance(value, str) else json.dumps(value)


def _check_knob(mechanism: str, knob: str) -> None:
    registry = next((known for known in (POLICIES, SCHEDULES, INPUTS) if mechanism in known), None)
    if registry is None:
        raise ValueError(f"no mechanism is called {mechanism!r}; `streamdiff_core.mechanisms` lists all")
    knobs = [k.name for k in read_knobs(registry[mechanism])]
    if knob not in knobs:
        raise ValueError(f"{mechanism} has no knob {knob!r}; it has: {', '.join(knobs) or 'none'}")


def _parse_value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except ValueError:
        return text


def _split(text: str) -> list[str]:
    parts, depth, is_quoted = [""], 0, False
    for letter in text:
        is_quoted ^= letter == '"'
        depth += 0 if is_quoted else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not is_quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
