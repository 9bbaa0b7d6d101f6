"""rope.py: angles by hand, a loop as slow twin, the five position maps by hand, and no end at 1,024
frames."""

import math

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.rope import (
    rotate,
    spatial_rotation,
    temporal_positions,
    temporal_rotation,
    wrapped_frame,
)

CPU = torch.device("cpu")
COLUMNS = (4, 2, 2)  # heads of 16


def slow_rotate(x: torch.Tensor, angles: list[list[float]]) -> torch.Tensor:
    """x [L, n, d]: pair (2i, 2i + 1) of token t turned by angles[t][i]."""
    out = x.clone()
    for t, row in enumerate(angles):
        for i, a in enumerate(row):
            even, odd = x[t, :, 2 * i], x[t, :, 2 * i + 1]
            out[t, :, 2 * i] = even * math.cos(a) - odd * math.sin(a)
            out[t, :, 2 * i + 1] = even * math.sin(a) + odd * math.cos(a)
    return out


def test_quarter_turn_by_hand():
    turn = torch.polar(torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), math.pi / 2, dtype=torch.float64))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    assert_close(rotate(x, turn), torch.tensor([[[-2.0, 1.0, 3.0, 4.0]]], dtype=torch.float64))


def test_temporal_angles_by_hand():
    # column i of 4 turns by position * 10000 ** (-i / 4): 3, 0.3, 0.03, 0.003 at position 3
    angles = temporal_rotation((0, 3), COLUMNS, torch.float64, CPU).angle()
    assert_close(angles, torch.tensor([[0, 0, 0, 0], [3, 0.3, 0.03, 0.003]], dtype=torch.float64))


def test_spatial_angles_by_hand():
    # 2 rows x 3 columns in (y, x) order; each axis has 2 columns, which turn by position and position / 100
    angles = spatial_rotation(2, 3, COLUMNS, torch.float64, CPU).angle()
    expected = [[0, 0, 0, 0, y, y / 100, x, x / 100] for y in (0, 1) for x in (0, 1, 2)]
    assert_close(angles, torch.tensor(expected, dtype=torch.float64))


def test_each_axis_has_frequencies_of_its_own_width():
    # Wan's heads of 128: 22 temporal columns but 21 for rows, so the last frequencies differ
    wan = (22, 21, 21)
    time = temporal_rotation((1,), wan, torch.float64, CPU).angle()[0]
    space = spatial_rotation(2, 1, wan, torch.float64, CPU).angle()[1, 22:43]
    assert time[-1].item() == pytest.approx(10_000 ** (-21 / 22))
    assert space[-1].item() == pytest.approx(10_000 ** (-20 / 21))


def test_time_and_space_together_are_the_slow_loop():
    x = torch.randn(6, 2, 16, dtype=torch.float64)
    in_space = rotate(x, spatial_rotation(2, 3, COLUMNS, torch.float64, CPU))
    fast = rotate(in_space, temporal_rotation((7,), COLUMNS, torch.float64, CPU))
    angles = [[7 * 10_000 ** (-i / 4) for i in range(4)] + [y, y / 100, x, x / 100] for y in (0, 1) for x in (0, 1, 2)]
    assert_close(fast, slow_rotate(x, angles), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotation_keeps_dtype_and_length(dtype):
    x = torch.randn(6, 2, 16).to(dtype)
    y = rotate(x, spatial_rotation(2, 3, COLUMNS, dtype, CPU))
    assert y.dtype == dtype
    # float32 sums, then one rounding to the dtype
    tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert_close(x.double().norm(dim=-1), y.double().norm(dim=-1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shift", [1, 1_000, 100_000])
def test_only_differences_of_positions_matter(shift):
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64).unbind(0)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [rotate(t, temporal_rotation((p,), COLUMNS, torch.float64, CPU)) for t, p in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    # float64 rounds the angle 100,000 to 1e-11
    assert_close(score(9, 4), score(9 + shift, 4 + shift), rtol=0, atol=1e-9)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.transpose(0, 1)[..., :8],  # pairs stay neighbours: no copy
        lambda x: x[..., 1:9],  # from an odd place
        lambda x: x[..., ::2],
        lambda x: x.flatten()[: 7 * 3 * 9].view(7, 3, 9)[..., :8],  # rows of odd length
    ],
)
def test_any_layout_in_memory_gives_the_same(cut):
    x = cut(torch.randn(5, 5, 16, dtype=torch.float64))
    turn = temporal_rotation((3,), (4, 0, 0), torch.float64, torch.device("cpu"))
    assert torch.equal(rotate(x, turn), rotate(x.clone(memory_format=torch.contiguous_format), turn))


def test_float32_positions_stay_exact_beyond_the_reference_table():
    """A float32 angle of 100,000 would be off by 0.004; the reference's table ends at 1,024."""
    got = temporal_rotation((1_023, 1_024, 100_000), COLUMNS, torch.float32, CPU)
    assert got.dtype == torch.complex64
    for row, position in zip(got, (1_023, 1_024, 100_000), strict=True):
        assert row[0].real.item() == pytest.approx(math.cos(position), abs=1e-6)
        assert row[0].imag.item() == pytest.approx(math.sin(position), abs=1e-6)


def test_rotations_made_in_a_session_can_be_trained_with():
    """The multipliers are shared through a cache; one made under inference_mode must not break a later
    backward."""
    with torch.inference_mode():
        turn = temporal_rotation((91_234,), COLUMNS, torch.float32, CPU)
        spatial_rotation(5, 7, COLUMNS, torch.float32, CPU)
    x = torch.randn(1, 1, 16, requires_grad=True)
    rotate(x, turn).sum().backward()
    y = torch.randn(35, 1, 16, requires_grad=True)
    rotate(y, spatial_rotation(5, 7, COLUMNS, torch.float32, CPU)).sum().backward()
    assert x.grad is not None and y.grad is not None


# Sinks 0, 1, 2 and the window 6, 7, 8 (frame 8 is the current one), as in the released configuration.
@pytest.mark.parametrize(
    "mode, sinks, window",
    [
        ("absolute", [0, 1, 2], [6, 7, 8]),
        ("packed", [0, 1, 2], [3, 4, 5]),
        ("slots", [0, 1, 2], [6, 7, 8]),  # origins 0 and 6
        ("ahead", [38, 39, 40], [6, 7, 8]),  # 8 + 30 onwards
        ("wrap", [0, 1, 2], [6, 7, 8]),  # before the refresh
    ],
)
def test_maps_by_hand(mode, sinks, window):
    assert temporal_positions(mode, [0, 1, 2], [6, 7, 8]) == (sinks, window)


def test_maps_far_into_the_stream_by_hand():
    sinks, window = [0, 1, 2], [1998, 1999, 2000]
    assert temporal_positions("packed", sinks, window) == ([0, 1, 2], [3, 4, 5])
    assert temporal_positions("slots", sinks, window, slot_origins=(2, 9)) == ([2, 3, 4], [9, 10, 11])
    assert temporal_positions("ahead", sinks, window, ahead_frames=4) == ([2004, 2005, 2006], window)
    # counting goes 5 … 49, 5 … 49: frame 50 is 5 and the period is 45; 2000 = 50 + 43 * 45 + 15 -> 20
    assert temporal_positions("wrap", sinks, window) == ([0, 1, 2], [18, 19, 20])


def test_maps_while_only_sinks_are_there():
    for mode in ("absolute", "packed", "slots", "ahead", "wrap"):
        assert temporal_positions(mode, [0, 1], []) == ([0, 1], [])


def test_old_keys_keep_their_position_across_a_refresh():
    # frame 50 jumps to 5 while 48 and 49 stay where they are (SPEC §2.5)
    assert temporal_positions("wrap", [0, 1, 2], [48, 49, 50])[1] == [48, 49, 5]


def test_refresh_by_counting():
    for refresh_at, restart_at in [(50, 5), (50, 0), (7, 6), (20, 4)]:
        position = 0
        for frame in range(300):
            if position >= refresh_at:
                position = restart_at
            assert wrapped_frame(frame, refresh_at=refresh_at, restart_at=restart_at) == position
            position += 1


def test_unknown_map():
    with pytest.raises(ValueError, match="unknown position map 'pack'; use absolute, packed, slots, ahead or wrap"):
        temporal_positions("pack", [0], [1])
