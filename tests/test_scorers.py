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
        # output 1 → 1 → 7, source 0 → -1 → 7, both of RMS 5: changes 0, 1.2 and 0.2, 1.6
        ("motion", -0.4),
        ("steadiness", -1.2),
        ("detail", 0.0),  # flat frames
    ],
)
def test_by_hand(name, expected):
    assert scored(name, frames(1, 7), frames(-1, 7), PAST) == pytest.approx(expected, abs=1e-6)


def test_the_worst_frame_counts():
    assert scored("motion", frames(7, 1), frames(7, 1), PAST) == pytest.approx(-0.2)  # gaps 1.4 - 1.2 and 0
    assert scored("steadiness", frames(5, 5), frames(0, 0), PAST) == pytest.approx(-0.8)
    sharp = torch.randn(1, 2, 4, 4)
    assert scored("detail", torch.cat([sharp, frames(1)]), sharp) == pytest.approx(0, abs=1e-6)
    assert scored("detail", sharp, sharp) > 0.3


def test_contrast_is_no_motion():
    """Output of three times the input's contrast that moves alike; an input of zeros (text to video) has no motion."""
    past = Past(x0=frames(3)[0], source=frames(1)[0])
    assert scored("motion", frames(6, 9), frames(2, 3), past) == pytest.approx(0, abs=1e-6)
    assert scored("motion", frames(5, 5), frames(0, 0), PAST) == pytest.approx(-0.8)


def test_without_a_past_only_the_chunks_own_changes_count():
    assert scored("motion", frames(1, 7), frames(-1, 7)) == pytest.approx(-0.4)
    assert scored("motion", frames(9), frames(0)) == scored("steadiness", frames(9), frames(0)) == 0
