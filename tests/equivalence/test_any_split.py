"""However a clip is cut into pushes, the same frames come out, bit for bit, and as many as went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pipeline import RELEASED_STEPS, moving_frames, random_pipeline, stream

NUM_FRAMES = 38
OPTIONS = {
    "stream batch": dict(steps=3),
    "sequential": dict(steps=2, schedule="sequential", clean_pass=True),
    "two latent frames": dict(steps=2, latent_frames_per_chunk=2),
}


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline(RELEASED_STEPS)


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES, height=72, width=88)  # cropped and resized on the way in


@pytest.fixture(scope="module")
def whole(pipe, frames):
    """The clip pushed at once, per set of options."""
    return {name: stream(pipe.start("pencil", **options), frames) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_frame_by_frame(pipe, frames, whole, name):
    out = stream(pipe.start("pencil", **OPTIONS[name]), frames, [1] * NUM_FRAMES)
    assert len(out) == NUM_FRAMES
    assert np.array_equal(out, whole[name])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, NUM_FRAMES - 1), max_size=12), name=st.sampled_from(list(OPTIONS)))
def test_any_split(pipe, frames, whole, cuts, name):
    edges = [0, *sorted(cuts), NUM_FRAMES]
    lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert np.array_equal(stream(pipe.start("pencil", **OPTIONS[name]), frames, lengths), whole[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_frames_out_equal_frames_in(pipe, frames, whole, name):
    """1 … 14 frames; upstream drops what does not fill a chunk and the last S - 1 chunks.

    Where the clip ends only changes the chunk it ends in: frames of whole chunks are those of the longer
    clip.
    """
    group = 4 * OPTIONS[name].get("latent_frames_per_chunk", 1)
    for length in range(1, 15):
        session = pipe.start("pencil", **OPTIONS[name])
        out = stream(session, frames[:length])
        assert out.shape == (length, 64, 64, 3) and out.dtype == np.uint8
        whole_chunks = 1 + (length - 1) // group * group if length > group else 0
        assert np.array_equal(out[:whole_chunks], whole[name][:whole_chunks])
        assert session.stats.num_frames_in == session.stats.num_frames_out == length
        assert len(session.flush()) == 0


def test_a_padded_tail_is_the_last_frame_repeated(pipe, frames):
    """7 frames = a chunk of 5 and one of 2, padded by repeating frame 7; the padding is cut off again."""
    padded = np.concatenate([frames[:7], frames[6:7], frames[6:7]])
    assert np.array_equal(
        stream(pipe.start("pencil", steps=3), frames[:7]), stream(pipe.start("pencil", steps=3), padded)[:7]
    )


def test_frames_come_as_soon_as_their_chunk_is_done(pipe, frames):
    """S = 3: the first chunk at once, chunk i with the push that completes chunk i + 2."""
    session = pipe.start("pencil", steps=3)
    counts = [len(session.push(frames[i : i + 1])) for i in range(25)]
    #        5 frames complete chunk 0; 9, 13: in flight; 17 brings chunk 1, 21 chunk 2, 25 chunk 3
    assert {i + 1: n for i, n in enumerate(counts) if n} == {5: 5, 17: 4, 21: 4, 25: 4}
    assert len(session.flush()) == 8
