"""Scores of finished chunks, by hand on flat frames."""

from __future__ import annotations

import pytest
import torch
from schedule_script import make_chunk

from streamdiff_core.schedules.scorers import Past, get_scorer


def frames(*values):
    return torch.stack([torch.full((2, 4, 4), float(v)) for v in values])


def scored(name, x0, source, past=None):
    chunk = make_chunk(1)
    chunk.latents = source
    return get_scorer(name)(x0, chunk, past)


PAST = Past(x0=frames(1.0)[0], source=frames(0.0)[0])


@pytest.mark.parametrize(
    "name, expected",
    [
        # output 1 → 1.5 → 3 changes by 0.5 and 1.5, input 0 → 1 → 2 by 1 and 1: gaps 0.5 and 0.5
        ("motion", -0.5),
        ("steadiness", -1.5),
        ("detail", 0.0),  # flat frames
    ],
)
def test_by_hand(name, expected):
    assert scored(name, frames(1.5, 3.0), frames(1.0, 2.0), PAST) == pytest.approx(expected, abs=1e-6)


def test_the_worst_frame_counts():
    assert scored("motion", frames(2.0, 3.0), frames(1.0, 5.0), PAST) == pytest.approx(-3)  # gaps 0 and 3
    assert scored("steadiness", frames(5.0, 5.0), frames(0.0, 0.0), PAST) == pytest.approx(-4)
    sharp = torch.randn(1, 2, 4, 4)
    assert scored("detail", torch.cat([sharp, frames(1.0)]), sharp) == pytest.approx(0, abs=1e-6)
    assert scored("detail", sharp, sharp) > 0.3


def test_without_a_past_only_the_chunks_own_changes_count():
    assert scored("motion", frames(9.0, 10.0), frames(0.0, 3.0)) == pytest.approx(-2)
    assert scored("motion", frames(9.0), frames(0.0)) == scored("steadiness", frames(9.0), frames(0.0)) == 0
