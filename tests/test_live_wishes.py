"""Wishes are granted in order, with the time they were asked; one that cannot be is told and the rest go on."""

from __future__ import annotations

import pytest

from streamdiff_core.live_wishes import MAX_WISHES, Wishes


@pytest.fixture
def events():
    return []


def test_they_are_granted_in_order_with_the_time_they_were_asked(events):
    times_s, granted = iter([10.0, 11.5]), []
    wishes = Wishes(events.append, lambda: next(times_s))
    wishes.add(lambda *args: granted.append(("steps", *args)), 2, "x")
    wishes.add(lambda *args: granted.append(("finish", *args)))
    assert len(wishes) == 2 and not granted, "only the model's thread grants"
    wishes.grant_next()
    assert granted == [("steps", 2, "x", 10.0)]
    wishes.grant_next()
    assert granted[1:] == [("finish", 11.5)] and not wishes and not events


def test_one_that_cannot_be_granted_is_told_and_the_next_is_granted(events):
    granted, wishes = [], Wishes(events.append, lambda: 0.0)

    def refuse(asked_s):
        raise ValueError("steps must be 1 to 4")

    wishes.add(refuse)
    wishes.add(granted.append)
    wishes.grant_next()
    (event,) = events
    assert (event["code"], event["sentence"], event["fatal"]) == ("bad_setting", "Steps must be 1 to 4.", False)
    wishes.grant_next()
    assert granted == [0.0] and len(events) == 1


def test_our_own_mistakes_are_not_taken_for_the_viewer_s(events):
    wishes = Wishes(events.append, lambda: 0.0)
    wishes.add(lambda asked_s: {}["absent"])
    with pytest.raises(KeyError):
        wishes.grant_next()
    assert not events and not wishes


def test_no_more_than_so_many_wait(events):
    granted, wishes = [], Wishes(events.append, lambda: 0.0)
    for number in range(MAX_WISHES + 1):
        wishes.add(lambda number, asked_s: granted.append(number), number)
    assert len(wishes) == MAX_WISHES and [e["sentence"] for e in events] == ["Too many changes wait already."]
    while wishes:
        wishes.grant_next()
    assert granted == list(range(MAX_WISHES)), "the newest is the one that is refused"
