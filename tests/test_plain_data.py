"""Plain values against declared types: what is taken, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from streamdiff_core.plain_data import check_fields, from_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int
    scale: float | None
    name: str = "x"
    pair: tuple[int, int] = (0, 1)
    many: tuple[float, ...] = ()
    inner: Inner = Inner()
    anything: Any = None


GOOD = dict(count=2, scale=0.5)


def test_lists_and_mappings_become_what_is_declared() -> None:
    made = from_plain(
        Outer, GOOD | {"pair": [3, 4], "many": [1, 2.5], "inner": {"side": "right"}}, "it", complete=False
    )
    assert made == Outer(count=2, scale=0.5, pair=(3, 4), many=(1, 2.5), inner=Inner(side="right"))
    check_fields(made)
    check_fields(Outer(count=np.int64(3), scale=None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 2.0}, "count must be a whole number, got 2.0"),
        ({"count": False}, "count must be a whole number, got False"),
        ({"scale": "0.5"}, "scale must be a finite number or nothing, got '0.5'"),
        ({"scale": float("inf")}, "scale must be a finite number or nothing, got inf"),
        ({"count": 10**400}, "count must be a whole number, got 1000"),
        ({"scale": 10**400}, "scale must be a finite number or nothing, got 1000"),
        ({"name": None}, "name must be text, got None"),
        ({"pair": [1]}, "pair must be a list of whole numbers, got (1,)"),
        ({"pair": [1, "2"]}, "pair must be a list of whole numbers"),
        ({"many": [1.0, None]}, "many must be a list of finite numbers"),
        ({"many": 1.0}, "many must be a list of finite numbers, got 1.0"),
        ({"inner": {"side": "up"}}, "side must be one of left, right, got 'up'"),
        ({"inner": {"top": 1}}, "it.inner has the unknown field 'top'; known: side"),
        ({"inner": 3}, "inner must be a Inner, got 3"),
        ({"colour": 1}, "it has the unknown field 'colour'; known: count, scale"),
    ],
)
def test_refused(change: dict, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        from_plain(Outer, GOOD | change, "it", complete=False)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_missing_and_no_mapping() -> None:
    with pytest.raises(ValueError, match="it lacks the field 'scale'"):
        from_plain(Outer, {"count": 1}, "it", complete=False)
    with pytest.raises(ValueError, match="it lacks the field 'name'"):
        from_plain(Outer, GOOD, "it")
    for value in ([], None, "text" * 100):
        with pytest.raises(ValueError, match="it must be an object with named fields") as refused:
            from_plain(Outer, value, "it")
        assert len(str(refused.value)) < 150


def test_fields_set_by_hand_are_checked_too() -> None:
    with pytest.raises(ValueError, match="side must be one of left, right"):
        check_fields(Outer(count=1, scale=1.0, inner=Inner(side="down")))
