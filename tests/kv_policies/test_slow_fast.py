"""Slow-fast memory: which chunks are surprising, what they leave behind, and that attention reads it."""

import torch
from policy_script import CLOSE, HEAD_DIM, HEADS, MODEL, TOKENS, Feed, policy_of, run, twin, words
from torch.testing import assert_close


class Scenes(Feed):
    """Keys share a mean that is turned by 90° where a scene begins; plus noise whose mean is 0."""

    def __init__(self, begins):
        super().__init__()
        self.begins = begins

    def __call__(self, what, frame, layer):
        x = super().__call__(what, frame, layer)
        if what != "k":
            return x
        scene = sum(frame >= b for b in self.begins)
        mean = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
        mean[:, scene] = 3.0
        return x - x.mean(0) + mean


def lines_of(policy, chunks, feed):
    table_lines, original = [], policy.plan

    class Spy:
        def __getattr__(self, name):
            return getattr(policy, name)

        def plan(self, table, frame_ids, descriptor=None):
            plan = original(table, frame_ids, descriptor)
            table_lines.append(words(table, plan))
            return plan

    outputs = run(Spy(), chunks, feed)
    return table_lines, outputs


CHUNKS = [(0, 1), *((f,) for f in range(2, 13))]


def test_surprising_frames_outlive_the_window():
    """Scenes begin at 3, 5 and 7; sink 1, window 2, slow memory 2. Frame 3 leaves the window at 5, 5 at 7, 7 at 9;
    then 3 makes room."""
    lines, outputs = lines_of(
        policy_of("slow_fast", 1, 2, slow_frames=2, every_chunks=1), CHUNKS, feed := Scenes((3, 5, 7))
    )
    assert lines[2:10] == [
        "s0@0 w2@1 w3@2",
        "s0@0 w3@1 w4@2",
        "s0@0 m3@1 w4@2 w5@3",
        "s0@0 m3@1 w5@2 w6@3",
        "s0@0 m3@1 m5@2 w6@3 w7@4",
        "s0@0 m3@1 m5@2 w7@3 w8@4",
        "s0@0 m5@1 m7@2 w8@3 w9@4",
        "s0@0 m5@1 m7@2 w9@3 w10@4",
    ]
    for layer in range(MODEL.num_layers):
        memory = [(feed("k", f, layer), feed("v", f, layer), at, 1) for at, f in enumerate((0, 5, 7, 9, 10))]
        assert_close(outputs[9][layer], twin([feed("q", 10, layer)], [4], memory), **CLOSE)


def test_only_every_second_chunk_is_checked():
    """Chunks count from 0, so frame f is chunk f - 1: checked are frames 3, 5, 7 …, not 4 and 8."""
    lines, _ = lines_of(policy_of("slow_fast", 1, 2, slow_frames=3, every_chunks=2), CHUNKS, Scenes((4, 5, 8)))
    assert lines[-1] == "s0@0 m5@1 w11@2 w12@3"


def test_of_a_longer_chunk_the_first_frame_is_kept():
    chunks = [(0, 1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    lines, _ = lines_of(policy_of("slow_fast", 1, 4, slow_frames=3, every_chunks=1), chunks, Scenes((5,)))
    assert lines[-1] == "s0@0 m5@1 w7@2 w8@3 w9@4 w10@5"


def test_what_does_not_count_as_a_surprise():
    """The sink's chunk has nothing before it; quiet chunks stay quiet; tokens are pooled before they are compared."""
    lines, _ = lines_of(policy_of("slow_fast", 1, 2, slow_frames=3, every_chunks=1), CHUNKS, Scenes(()))
    assert all("m" not in line for line in lines) and TOKENS > 1
