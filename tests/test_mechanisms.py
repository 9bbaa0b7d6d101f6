"""mechanisms.py: the list is read from the code, is complete, and docs/MECHANISMS.md is current."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.mechanisms import (
    INPUTS,
    SWITCH_RULES,
    WAITING,
    Knob,
    all_pairs,
    as_markdown,
    describe,
    list_mechanisms,
    refused_pairs,
)
from streamdiff_core.schedules import SCHEDULES

KINDS = {"policy": POLICIES, "schedule": SCHEDULES, "input": INPUTS, "switch": SWITCH_RULES}
ALL = [(kind, name) for kind, registry in KINDS.items() for name in registry]
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Example:
    """Keeps every other frame,
    and says so.

    Paper: Somebody et al.,
        section 3.
    Training-free: yes.
    Look for: nothing.
    """

    config: int = 0
    """Not a knob."""
    every: int = 2
    """Which frames
    are kept."""


class WithoutFields:
    """A schedule."""

    def __init__(self, stepper, num_steps, *, clean_pass=False):
        pass


def test_a_class_is_read():
    m = describe("example", "policy", Example)
    assert (m.name, m.kind, m.title) == ("example", "policy", "Keeps every other frame, and says so.")
    assert (m.paper, m.training_free, m.look_for) == ("Somebody et al., section 3.", "yes.", "nothing.")
    assert m.cost == m.deviates == ""
    assert m.knobs == (Knob(name="every", default=2, summary="Which frames are kept."),)


def test_keyword_parameters_are_knobs():
    assert describe("x", "schedule", WithoutFields).knobs == (Knob(name="clean_pass", default=False, summary=""),)


def test_everything_is_listed():
    names = {(m.kind, m.name) for m in list_mechanisms() if m.is_available}
    assert names == set(ALL) and len(ALL) == len(set(ALL))
    waiting = [m for m in list_mechanisms() if not m.is_available]
    assert {m.name for m in waiting} == set(WAITING)
    assert all(m.training_free.startswith("no: ") and m.paper for m in waiting)


@pytest.mark.parametrize("kind, name", ALL)
def test_each_says_what_a_reader_needs(kind, name):
    (m,) = [m for m in list_mechanisms() if m.name == name and m.kind == kind]
    assert m.title.endswith(".") and m.paper and m.cost and m.look_for
    assert m.training_free.split()[0].strip(".,:") in ("yes", "runs", "no")
    assert all(knob.summary for knob in m.knobs), "each knob needs a docstring line"


def test_pairs_that_are_refused():
    """Sink 1 + window 3. A draft is shorter than its chunk; what is denoised together must fit window and policy."""
    assert len(all_pairs()) == len(set(all_pairs())) == len(POLICIES) * (len(SCHEDULES) + 3)
    by_steps = {}
    for steps in (1, 2, 4):
        refused = refused_pairs(steps=steps)
        assert all(len(reason) > 20 and "\n" not in reason and reason.count("; ") <= 1 for reason in refused)
        by_steps[steps] = sorted({pair[:2] for pairs in refused.values() for pair in pairs})
    assert by_steps[1] == sorted([("deep_forcing", "knot_overlap"), *((p, "speculative") for p in POLICIES)])
    assert by_steps[2] == [("deep_forcing", "knot_overlap"), ("deep_forcing", "rolling_window")]
    assert by_steps[4] == sorted([("deep_forcing", "knot_overlap"), *((p, "rolling_window") for p in POLICIES)])
    wide = CacheConfig(sink_frames=2, window_frames=9)
    assert not refused_pairs(steps=2, cache=wide)


def test_the_page_is_current():
    page = (REPOSITORY / "docs" / "MECHANISMS.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: python -m streamdiff_core.mechanisms > docs/MECHANISMS.md"


def test_the_command_prints_the_page():
    command = [sys.executable, "-m", "streamdiff_core.mechanisms"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0 and result.stdout == as_markdown()
