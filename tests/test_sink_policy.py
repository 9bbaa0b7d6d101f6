"""kv_policies/sink.py: slots and positions by hand, and the upstream defects that it does not have."""

import numpy as np
import pytest

from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_policies import SinkPolicy
from streamdiff_core.types import SlotTable

EAST, NORTH, WEST = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([-1.0, 0.0])
NORTH_EAST = np.array([0.6, 0.8])  # cosine 0.6 with EAST, 0.8 with NORTH, -0.6 with WEST


def policy_of(sink: int, window: int, positions: str = "absolute", **options) -> SinkPolicy:
    return SinkPolicy(CacheConfig(sink_frames=sink, window_frames=window, positions=positions, **options))


def play(policy: SinkPolicy, chunks: list[tuple[int, ...]], descriptors: list | None = None) -> SlotTable:
    table = policy.new_table()
    for i, chunk in enumerate(chunks):
        policy.plan(table, chunk, descriptors[i] if descriptors else None)
    return table


# ---------------------------------------------------------------- which slot (SPEC §2.3)


def test_slots_of_the_released_configuration():
    """3 sinks + 3 rolling, first chunk of 2: frames fill slots 0 … 5, then 6→slot 3, 7→4, 8→5, 9→3."""
    policy = policy_of(3, 3)
    table = policy.new_table()
    assert policy.plan(table, (0, 1)).writes == ((0, 0), (1, 1))
    for frame, slot in [(2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (7, 4), (8, 5), (9, 3)]:
        plan = policy.plan(table, (frame,))
        assert plan.writes == ((slot, 0),)
        assert plan.num_visible == min(frame + 1, 6)
    assert table.frames == [0, 1, 2, 9, 7, 8]


def test_chunks_of_three_by_hand():
    """sink 1 + window 4, chunks of 3: (0 1 2) fills slots 0 … 2; (3 4 5) fills 3, 4 and evicts 1; and so
    on."""
    policy = policy_of(1, 4)
    table = policy.new_table()
    policy.plan(table, (0, 1, 2))
    assert policy.plan(table, (3, 4, 5)).writes == ((3, 0), (4, 1), (1, 2))
    assert table.frames == [0, 5, 2, 3, 4]
    assert policy.plan(table, (6, 7, 8)).writes == ((2, 0), (3, 1), (4, 2))
    assert table.frames == [0, 5, 6, 7, 8]


@pytest.mark.parametrize("sink, frames", [(0, [9, 10, 8]), (1, [0, 9, 10, 8]), (2, [0, 1, 8, 9, 10])])
def test_sink_count_is_honoured(sink, frames):
    """SPEC §2.3: upstream pins 3 frames whatever the setting. Frame f sits in slot sink + (f - sink) % 3."""
    table = play(policy_of(sink, 3), [(0, 1), *((f,) for f in range(2, 11))])
    expected = list(range(sink)) + [None] * 3
    for frame in (8, 9, 10):
        expected[sink + (frame - sink) % 3] = frame
    assert table.frames == expected
    assert sorted(table.frames) == sorted(frames)


# ---------------------------------------------------------------- which position, over several evictions


# sink 2 + window 2; slots of frames 0 … 7: 0 1 | 2 3, then 4→slot 2, 5→3, 6→2, 7→3. Per frame: position of
# each slot.
TABLES = {
    # the frame's own number
    "absolute": {3: (0, 1, 2, 3), 4: (0, 1, 4, 3), 5: (0, 1, 4, 5), 6: (0, 1, 6, 5), 7: (0, 1, 6, 7)},
    # age order: the older of the window at 2, the newer at 3, whichever slot holds it
    "packed": {3: (0, 1, 2, 3), 4: (0, 1, 3, 2), 5: (0, 1, 2, 3), 6: (0, 1, 3, 2), 7: (0, 1, 2, 3)},
    # sinks from 1, window from 9
    "slots": {3: (1, 2, 9, 10), 4: (1, 2, 10, 9), 5: (1, 2, 9, 10), 6: (1, 2, 10, 9), 7: (1, 2, 9, 10)},
    # sinks at newest + 30 and + 31, window at its own number
    "ahead": {3: (33, 34, 2, 3), 4: (34, 35, 4, 3), 5: (35, 36, 4, 5), 6: (36, 37, 6, 5), 7: (37, 38, 6, 7)},
    # refresh at 5, restart at cache_frames - 1 = 3: frames 0 … 7 sit at 0 1 2 3 4 3 4 3
    "wrap": {3: (0, 1, 2, 3), 4: (0, 1, 4, 3), 5: (0, 1, 4, 3), 6: (0, 1, 4, 3), 7: (0, 1, 4, 3)},
}


@pytest.mark.parametrize("positions", TABLES)
def test_positions_over_four_evictions(positions):
    policy = policy_of(2, 2, positions, slot_origins=(1, 9), refresh_at=5)
    table = policy.new_table()
    for chunk in [(0, 1), (2,)]:
        policy.plan(table, chunk)
    for frame, expected in TABLES[positions].items():
        plan = policy.plan(table, (frame,))
        assert plan.slot_positions == expected
        slot = 3 if frame % 2 else 2
        assert table.frames[slot] == frame and plan.query_positions == (expected[slot],)


def test_query_positions_of_a_chunk_of_two():
    policy = policy_of(1, 3, "packed")
    table = play(policy, [(0, 1), (2, 3)])  # slots: 0 | 1 2 3
    plan = policy.plan(table, (4, 5))  # 4→slot 1, 5→slot 2; window oldest first: 3, 4, 5
    assert table.frames == [0, 4, 5, 3]
    assert plan.slot_positions == (0, 2, 3, 1) and plan.query_positions == (2, 3)


# ---------------------------------------------------------------- when nothing may move


def test_later_steps_never_evict_and_never_touch_a_sink():
    """SPEC §2.8-2: upstream's sequential mode overwrites the previous chunk on steps 2 … S once the cache is
    full."""
    policy = policy_of(3, 3)
    table = play(policy, [(0, 1)])
    for frame in range(2, 30):
        first = policy.plan(table, (frame,))
        kept = list(table.frames)
        for _ in range(3):
            assert policy.plan(table, (frame,)) == first and table.frames == kept
        assert table.frames[:3] == ([0, 1, 2] if frame > 1 else [0, 1, None])
        assert {f for f in table.frames[3:] if f is not None} == set(range(max(3, frame - 2), frame + 1))


def test_the_chunk_before_last_can_be_written_again():
    """A stream batch or a re-cache goes back to a chunk that is still held; nothing moves."""
    policy = policy_of(1, 3)
    table = play(policy, [(0,), (1,), (2,), (3,), (4,)])
    kept = list(table.frames)
    assert policy.plan(table, (3,)).writes == ((table.slots_of(3)[0], 0),)
    assert policy.plan(table, (2, 3)).writes == ((2, 0), (3, 1)) and table.frames == kept


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("sink, window", [(0, 1), (0, 2), (1, 1)])
def test_a_first_chunk_that_fits_nowhere(sink, window):
    """It may use the sink slots as well, but not more than there are."""
    policy = policy_of(sink, window)
    table = policy.new_table()
    with pytest.raises(ValueError, match=f"a chunk of 3 latent frames does not fit a window of {window}.*raise"):
        policy.plan(table, (0, 1, 2))
    assert table.num_filled == 0
    if sink + window >= 2:
        assert policy.plan(table, (0, 1)).num_visible == 2


def test_a_later_chunk_longer_than_the_window():
    policy = policy_of(3, 1)
    table = play(policy, [(0, 1)])
    with pytest.raises(ValueError, match="a chunk of 2 latent frames does not fit a window of 1"):
        policy.plan(table, (2, 3))
    assert table.frames == [0, 1, None, None]


def test_a_frame_that_has_left():
    table = play(policy_of(1, 2), [(0,), (1,), (2,), (3,)])
    kept = list(table.frames)
    with pytest.raises(ValueError, match="latent frame 1 is not newer than the cache's newest frame 3"):
        policy_of(1, 2).plan(table, (1,))
    with pytest.raises(ValueError, match="latent frame 1 is not newer"):
        policy_of(1, 2).plan(table, (1, 2))  # 2 is still there, 1 is not
    assert table.frames == kept


# ---------------------------------------------------------------- adaptive sinks (SPEC §2.6)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_adaptive_sinks_by_hand(form):
    """2 sinks (EAST, NORTH_EAST) + 2 rolling, threshold 0.2; sinks against each chunk:

    frame 4 NORTH: cosines 0 and 0.8, so sink 0 is stale.
    frame 5 NORTH: cosines 1 and 0.8, nothing is stale.
    frame 6 WEST: cosines 0 (sink 0 is NORTH now) and -0.6, both stale, sink 1 the worse.
    """
    policy = policy_of(2, 2, adaptive_sink=form)
    steps = [(0, EAST), (1, NORTH_EAST), (2, EAST), (3, EAST), (4, NORTH), (5, NORTH), (6, WEST)]
    tables = {
        # one sink at most, instead of rolling: slots 2 and 3 keep 2 and 3 while 4 goes to slot 0
        "released": {3: [0, 1, 2, 3], 4: [4, 1, 2, 3], 5: [4, 1, 5, 3], 6: [4, 6, 5, 3]},
        # every stale sink, and the window rolls as well
        "paper": {3: [0, 1, 2, 3], 4: [4, 1, 4, 3], 5: [4, 1, 4, 5], 6: [6, 6, 6, 5]},
    }[form]
    writes = {
        "released": {4: ((0, 0),), 5: ((2, 0),), 6: ((1, 0),)},
        "paper": {4: ((0, 0), (2, 0)), 5: ((3, 0),), 6: ((0, 0), (1, 0), (2, 0))},
    }[form]
    table = policy.new_table()
    for frame, descriptor in steps:
        plan = policy.plan(table, (frame,), descriptor)
        if frame in tables:
            assert table.frames == tables[frame]
        assert plan.writes == writes.get(frame, plan.writes)
    assert table.is_sink == [True, True, False, False]


@pytest.mark.parametrize("form", ["released", "paper"])
def test_empty_slots_are_never_compared(form):
    """SPEC §2.6a: upstream compares sink slot 2 while it is zeros and frame 6 then replaces sink 2."""
    chunks = [(0, 1), *((f,) for f in range(2, 7))]
    table = play(policy_of(3, 3, adaptive_sink=form), chunks, [EAST] * len(chunks))
    assert table.frames == [0, 1, 2, 6, 4, 5]


@pytest.mark.parametrize("form", ["released", "paper"])
def test_sinks_are_not_refreshed_while_the_cache_fills(form):
    table = play(policy_of(2, 2, adaptive_sink=form), [(0, 1), (2,), (3,)], [EAST, NORTH, WEST])
    assert table.frames == [0, 1, 2, 3]


@pytest.mark.parametrize("form", ["released", "paper"])
def test_one_decision_per_chunk_whatever_the_steps(form):
    """SPEC §2.6b: upstream checks on every step and can give one chunk two sinks."""
    policy = policy_of(2, 2, adaptive_sink=form)
    table = play(policy, [(f,) for f in range(4)], [EAST, EAST, EAST, EAST])
    first = policy.plan(table, (4,), NORTH)
    kept = list(table.frames)
    for descriptor in (NORTH, WEST, EAST, None):
        assert policy.plan(table, (4,), descriptor) == first and table.frames == kept
    assert kept == {"released": [4, 1, 2, 3], "paper": [4, 4, 4, 3]}[form]


def test_released_form_replaces_the_least_similar_sink_only():
    policy = policy_of(3, 1, adaptive_sink="released", adaptive_threshold=0.9)
    table = play(policy, [(0,), (1,), (2,), (3,)], [NORTH_EAST, WEST, NORTH, EAST])
    policy.plan(table, (4,), EAST)  # cosines 0.6, -1, 0: all below 0.9
    assert table.frames == [0, 4, 2, 3]


def test_threshold_is_strict_and_off_means_off():
    chunks, seen = (
        [(0,), (1,), (2,)],
        [NORTH_EAST, EAST, EAST],
    )  # sink 1 + window 1; cosine 0.6 when frame 2 comes
    for options, frames in [
        ({"adaptive_sink": "released", "adaptive_threshold": 0.6}, [0, 2]),
        ({"adaptive_sink": "released", "adaptive_threshold": 0.61}, [2, 1]),
        ({"adaptive_sink": "paper", "adaptive_threshold": 0.61}, [2, 2]),
        ({"adaptive_sink": "off", "adaptive_threshold": 0.61}, [0, 2]),
    ]:
        assert play(policy_of(1, 1, **options), chunks, seen).frames == frames


@pytest.mark.parametrize("form", ["released", "paper"])
def test_longer_chunks_and_missing_descriptors_leave_sinks_alone(form):
    policy = policy_of(2, 2, adaptive_sink=form)
    assert play(policy, [(0, 1), (2, 3), (4, 5)], [EAST, EAST, WEST]).frames == [0, 1, 4, 5]
    assert play(policy, [(0, 1), (2,), (3,), (4,)]).frames == [0, 1, 4, 3]
    late = play(policy, [(0, 1), (2,), (3,), (4,)], [None, EAST, EAST, WEST])  # sinks came without a descriptor
    assert late.frames == [0, 1, 4, 3]
    assert play(policy_of(0, 2, adaptive_sink=form), [(0,), (1,), (2,)], [EAST, EAST, WEST]).frames == [2, 1]


def test_descriptors_do_not_pile_up():
    policy = policy_of(2, 2, adaptive_sink="released")
    table = play(policy, [(f,) for f in range(200)], [EAST if f % 7 else WEST for f in range(200)])
    assert set(table.descriptors) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "positions, before, after",
    [
        # frames of the slots: 4 1 | 2 3, then 4 1 | 5 3
        ("absolute", (4, 1, 2, 3), (4, 1, 5, 3)),
        ("wrap", (4, 1, 2, 3), (4, 1, 5, 3)),
        ("packed", (3, 0, 1, 2), (1, 0, 3, 2)),
        ("slots", (8, 0, 6, 7), (1, 0, 7, 6)),
        ("ahead", (4, 34, 2, 3), (36, 35, 5, 3)),
    ],
)
def test_a_chunk_that_becomes_a_sink_is_read_as_the_newest_frame_first(positions, before, after):
    """Released form: chunk 4 lands in sink slot 0 without rolling. While it is the current chunk it must come
    after the window (the query is last in every map); from the next chunk on it is a sink."""
    policy = policy_of(2, 2, positions, adaptive_sink="released")
    table = play(policy, [(f,) for f in range(4)], [EAST, NORTH, NORTH, NORTH])
    plan = policy.plan(table, (4,), NORTH)
    assert table.frames == [4, 1, 2, 3]
    assert plan.slot_positions == before and plan.query_positions == (before[0],)
    plan = policy.plan(table, (5,), NORTH)
    assert table.frames == [4, 1, 5, 3]
    assert plan.slot_positions == after and plan.query_positions == (after[2],)
