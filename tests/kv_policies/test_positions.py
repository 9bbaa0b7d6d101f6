"""The policies that only say where things are: tables by hand over at least three evictions."""

import pytest
from policy_script import CLOSE, MODEL, Feed, policy_of, run, seen, singles, twin
from torch.testing import assert_close

# first chunk of 2 frames, then 1 each; sink 1 + window 3 unless said otherwise
FIRST = [(0, 1)]


def test_sliding_window():
    """sink 1 + window 2 gives a window of 3; frame 3 evicts 0, 4 evicts 1, 5 evicts 2."""
    assert seen(policy_of("sliding_window", 1, 2, "absolute"), FIRST + singles(2, 5)) == [
        "w0@0 w1@1",
        "w0@0 w1@1 w2@2",
        "w1@1 w2@2 w3@3",
        "w2@2 w3@3 w4@4",
        "w3@3 w4@4 w5@5",
    ]


def test_longlive_keeps_absolute_positions():
    assert seen(policy_of("longlive", 1, 2), FIRST + singles(2, 5)) == [
        "s0@0 w1@1",
        "s0@0 w1@1 w2@2",
        "s0@0 w2@2 w3@3",
        "s0@0 w3@3 w4@4",
        "s0@0 w4@4 w5@5",
    ]


def test_live_avatar_is_ahead():
    """The sink at newest + 30, in every chunk."""
    assert seen(policy_of("live_avatar", 1, 2), FIRST + singles(2, 5))[1:] == [
        "w1@1 w2@2 s0@32",
        "w2@2 w3@3 s0@33",
        "w3@3 w4@4 s0@34",
        "w4@4 w5@5 s0@35",
    ]


def test_knot_runs_ahead_in_steps():
    """Sink at 8; chunk i, c = 1, knot 1: moves to 12 when i + 2 > 8, that is at frame 7, and to 16 at frame 11."""
    lines = seen(policy_of("knot_forcing", 1, 2), FIRST + singles(2, 12))
    assert lines[1] == "w1@1 w2@2 s0@8"
    assert [int(line.split("@")[-1]) for line in lines] == [8] * 6 + [12] * 4 + [16] * 2


def test_knot_with_chunks_of_three_and_two_sinks():
    """c = 3, k = 1. Frames 3-5: 3 + 4 = 7, sink at 8. 6-8: 10 > 8, at 12. 9-11: 13 > 12, at 16. 12-14: 16, stays."""
    chunks = [(0, 1, 2, 3), *(tuple(range(f, f + 3)) for f in range(4, 17, 3))]
    lines = seen(policy_of("knot_forcing", 2, 4), chunks)
    # first frames 0, 4, 7, 10, 13, 16; reach 5, 8, 11, 14, 17, 20
    assert [line.split()[-2:] for line in lines] == [
        ["s0@8", "s1@9"], ["s0@8", "s1@9"], ["s0@12", "s1@13"], ["s0@16", "s1@17"], ["s0@20", "s1@21"],
        ["s0@20", "s1@21"],
    ]  # fmt: skip


def test_infinity_rope_without_events():
    assert seen(policy_of("infinity_rope", 1, 2, "absolute"), FIRST + singles(2, 5))[2:] == [
        "s0@0 w2@1 w3@2",
        "s0@0 w3@1 w4@2",
        "s0@0 w4@1 w5@2",
    ]


def test_infinity_rope_cut():
    """The chunk that comes with the cut is at 45; the next one is next to it again."""
    policy = policy_of("infinity_rope", 1, 3)
    assert seen(policy, FIRST + singles(2, 7), {5: "cut"})[3:] == [
        "s0@0 w2@1 w3@2 w4@3",
        "s0@0 w3@1 w4@2 w5@45",
        "s0@0 w4@1 w5@2 w6@3",
        "s0@0 w5@1 w6@2 w7@3",
    ]


def test_infinity_rope_cut_of_a_longer_chunk():
    """Chunk 3 of a window of 6: the paper's 45 … 47."""
    chunks = [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
    lines = seen(policy_of("infinity_rope", 1, 5), chunks, {7: "cut"})
    assert lines[2] == "s0@0 w5@1 w6@2 w7@45 w8@46 w9@47"
    assert lines[3] == "s0@0 w8@1 w9@2 w10@3 w11@4 w12@5"


@pytest.mark.parametrize("positions", ["absolute", "packed"])
def test_shot_sink(positions):
    """sink 1, shot sink 2, window 2, offset 8. Cuts at 4 and 8.

    Frames 4 and 5 are read in the window first and become the shot's sink when they leave it (at 6 and 7). The cut at
    8 drops them at once; 8 and 9 take their place when they leave, at 10 and 11. Shot 1 is 8 positions on, shot 2 16.
    """
    lines = seen(policy_of("shot_sink", 1, 2, positions, pinned_frames=2), FIRST + singles(2, 12), {4: "cut", 8: "cut"})
    expected = {
        "absolute": [
            "s0@0 w2@2 w3@3",
            "s0@0 w3@3 w4@12",
            "s0@0 w4@12 w5@13",
            "s0@0 s4@12 w5@13 w6@14",
            "s0@0 s4@12 s5@13 w6@14 w7@15",
            "s0@0 w7@15 w8@24",
            "s0@0 w8@24 w9@25",
            "s0@0 s8@24 w9@25 w10@26",
            "s0@0 s8@24 s9@25 w10@26 w11@27",
            "s0@0 s8@24 s9@25 w11@27 w12@28",
        ],
        "packed": [
            "s0@0 w2@1 w3@2",
            "s0@0 w3@1 w4@10",
            "s0@0 w4@9 w5@10",
            "s0@0 s4@9 w5@10 w6@11",
            "s0@0 s4@9 s5@10 w6@11 w7@12",
            "s0@0 w7@9 w8@18",
            "s0@0 w8@17 w9@18",
            "s0@0 s8@17 w9@18 w10@19",
            "s0@0 s8@17 s9@18 w10@19 w11@20",
            "s0@0 s8@17 s9@18 w11@19 w12@20",
        ],
    }[positions]
    assert lines[2:] == expected


def test_anchor_forcing():
    """sink 1 at 0, anchor of 2 at 3, window of 2 that stops at 8; prompts change at 4 and 8.

    The first anchor (4, 5) is read from frame 6 on, when 4 leaves the window. It stays until 8 leaves, at frame 10.
    """
    policy = policy_of("anchor_forcing", 1, 2, pinned_frames=2, anchor_position=3, last_position=8)
    assert seen(policy, FIRST + singles(2, 12), {4: "keep", 8: "recache"})[2:] == [
        "s0@0 w2@2 w3@3",
        "s0@0 w3@3 w4@4",
        "s0@0 w4@4 w5@5",
        "s0@0 a4@3 w5@5 w6@6",
        "s0@0 a4@3 a5@4 w6@6 w7@7",
        "s0@0 a4@3 a5@4 w7@7 w8@8",
        "s0@0 a4@3 a5@4 w8@7 w9@8",
        "s0@0 a8@3 w9@7 w10@8",
        "s0@0 a8@3 a9@4 w10@7 w11@8",
        "s0@0 a8@3 a9@4 w11@7 w12@8",
    ]


def test_anchor_forcing_in_the_papers_setting():
    """Chunk 3, sink 3, window 9: sink 0-2, anchor 6-8, local 12-20; while filling, the stream's own numbers."""
    policy = policy_of("anchor_forcing", 3, 9)
    chunks = [tuple(range(f, f + 3)) for f in range(0, 37, 3)]
    lines = seen(policy, chunks, {12: "recache"})
    assert lines[4] == " ".join(f"{'s' if f < 3 else 'w'}{f}@{f}" for f in [0, 1, 2, *range(6, 15)])
    anchor = "a12@6 a13@7 a14@8"  # chunk 12-14 leaves the window of 9 when 21-23 enters
    assert "a12" not in lines[6] and anchor in lines[7]
    window = " ".join(f"w{f}@{f - 18}" for f in range(30, 39))
    assert lines[12] == f"s0@0 s1@1 s2@2 {anchor} {window}"


def test_anchors_are_left_alone_by_a_recache():
    policy = policy_of("anchor_forcing", 1, 2, pinned_frames=2)
    table = policy.new_table()
    for frame in range(9):
        policy.before_chunk(table, "keep" if frame == 3 else None)
        policy.plan(table, (frame,))
    assert policy.before_chunk(table, "recache") == [(7, 8)]  # sink 0 and anchor 3, 4 are read, not written


@pytest.mark.parametrize(
    "name, knobs",
    [
        ("sliding_window", {}),
        ("longlive", {}),
        ("live_avatar", {}),
        ("knot_forcing", {}),
        ("infinity_rope", {}),
        ("shot_sink", {"pinned_frames": 2}),
        ("anchor_forcing", {"pinned_frames": 2, "anchor_position": 3, "last_position": 8}),
    ],
)
def test_attention_reads_what_the_tables_say(name, knobs):
    """Recomputed from raw keys and values turned to the positions above: no slot keeps an older turn."""
    feed, chunks, cuts = Feed(), [*FIRST, *singles(2, 12)], {4: "keep", 8: "recache"}
    if name in ("infinity_rope", "shot_sink"):
        cuts = {4: "cut", 8: "cut"}
    lines = seen(policy_of(name, 1, 2, **knobs), chunks, cuts)
    outputs = run(policy_of(name, 1, 2, **knobs), chunks, feed, switches=cuts, steps=2)
    for ids, line, layers in zip(chunks, lines, outputs, strict=True):
        at = {int(frame): int(position) for frame, position in (word[1:].split("@") for word in line.split())}
        for layer in range(MODEL.num_layers):
            memory = [(feed("k", f, layer), feed("v", f, layer), position, 1) for f, position in at.items()]
            assert_close(layers[layer], twin([feed("q", f, layer) for f in ids], [at[f] for f in ids], memory), **CLOSE)
