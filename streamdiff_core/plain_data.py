"""Plain data (JSON, keyword arguments) into frozen dataclasses, checked against the declared types.

Settings arrive from web pages, recipes and callers; a wrong one is refused here, in one sentence that names the field
and what it takes, before anything is changed. Only types are looked at: what a value means is its owner's business.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def check_fields(value: Any) -> None:
    """Refuse a dataclass whose fields do not have their declared types; nested ones are looked into.

    Raises:
        ValueError: the text names the field, what it takes and what it got.
    """
    hints = get_type_hints(type(value))
    for field in fields(value):
        held = getattr(value, field.name)
        _check(field.name, held, hints[field.name])
        if is_dataclass(held):
            check_fields(held)


def from_plain(cls: type[T], values: Any, what: str, *, complete: bool = True) -> T:
    """A dataclass from a mapping; lists become tuples and mappings nested dataclasses where these are declared.

    Args:
        what: name of the mapping in messages, such as ``"recipe"``.
        complete: whether fields with a default must be given too.

    Raises:
        ValueError: unknown or missing field, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object with named fields, got {_show(values)}")
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"{what} has the unknown field {name!r}; known: {', '.join(known)}")
    for name, field in known.items():
        optional = field.default is not MISSING or field.default_factory is not MISSING
        if name not in values and (complete or not optional):
            raise ValueError(f"{what} lacks the field {name!r}; it needs {', '.join(known)}")
    converted = {name: _convert(f"{what}.{name}", value, hints[name]) for name, value in values.items()}
    for name, value in converted.items():
        _check(name, value, hints[name])
    return cls(**converted)


def _convert(what: str, value: Any, hint: Any) -> Any:
    """Lists and mappings from JSON in the form that the declared type has."""
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(hint, value, what)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    return value


def _check(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_describe(hint)}, got {_show(value)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        many = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(many) and all(map(_fits, value, many))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint in (int, float):
        kind = Integral if hint is int else Real
        return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(arg) for arg in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"a list of {_describe(get_args(hint)[0]).removeprefix('a ')}s"
    if get_origin(hint) is Mapping:
        return f"an object of {_describe(get_args(hint)[1]).removeprefix('a ')}s by name"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
