"""A running stream changes its options: no frame is lost or repeated, and what the new cache knows is exactly defined.

The oracles reach the new state another way: the same cache object driven by the new schedule, or an unchanged stream
whose cache is trimmed by hand before every chunk.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pipeline import drive, moving_frames, random_pipeline, record_latents, stream
from torch.testing import assert_close

from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES, SinkPolicy
from streamdiff_core.schedules import StreamBatch
from streamdiff_core.schedules.steps import NoiseSource, Stepper

SWITCHES = SinkPolicy.switches
NUM_FRAMES = 49
CHANGE_AFTER = 25  # chunks 0 … 5; chunk 6 is the first under the new options
NEEDS_NEW_CACHE = [
    dict(steps=1),
    dict(steps=4),
    dict(schedule="sequential"),
    dict(schedule="sequential", clean_pass=True),
    dict(sink_frames=2, window_frames=2),
    dict(sink_frames=0, window_frames=6),
    dict(positions="absolute"),
]


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES)


@pytest.fixture(scope="module")
def plain(pipe, frames):
    """The clip with three steps and no change: (latents per chunk, frames)."""
    session = pipe.start("pencil", steps=3)
    latents = record_latents(session)
    return latents, stream(session, frames)


def changed(pipe, frames, start=None, **changes):
    """(latents per chunk, frames of each push) of a stream that changes in the middle."""
    session = pipe.start("pencil", **({"steps": 3} | (start or {})))
    latents, head = record_latents(session), session.push(frames[:CHANGE_AFTER])
    session.set_options(**changes)
    tail = [session.push(frames[i : i + 4]) for i in range(CHANGE_AFTER, len(frames), 4)]
    return latents, [head, *tail, session.flush()]


# --- what is in flight --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", NEEDS_NEW_CACHE, ids=str)
def test_what_is_in_flight_is_finished_first(pipe, frames, plain, changes):
    """Two chunks in flight come out as if nothing had changed, with the next chunk, which leaves at once too."""
    latents, pushes = changed(pipe, frames, **changes)
    assert [len(out) for out in pushes[:2]] == [CHANGE_AFTER - 8, 12]
    assert sum(map(len, pushes)) == NUM_FRAMES and len(latents) == 12
    assert np.abs(np.concatenate(pushes)[:CHANGE_AFTER].astype(int) - plain[1][:CHANGE_AFTER]).max() <= 1
    for old, new in zip(plain[0][:6], latents[:6], strict=True):
        assert (old - new).abs().max() < 1e-9  # rows run without the next chunk beside them
    assert (plain[0][6] - latents[6]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [dict(noise_scale=0.3), dict(motion_adaptive=False), dict(seed=1)], ids=str)
def test_what_needs_no_new_cache_does_not_touch_what_is_in_flight(pipe, frames, plain, changes):
    """The same chunks leave with the same pushes; those that had entered are bit for bit what they were."""
    latents, pushes = changed(pipe, frames, **changes)
    assert [len(out) for out in pushes] == [CHANGE_AFTER - 8, *[4] * 6, 8]
    # Chunks 4 and 5 take later steps beside the first chunk under the new options, each in its own row.
    assert all(torch.equal(old, new) for old, new in zip(plain[0][:6], latents[:6], strict=True))
    assert (plain[0][6] - latents[6]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, dict(steps=3, window_frames=3, width=64, schedule="stream_batch")], ids=str)
def test_the_same_options_again_are_no_change(pipe, frames, plain, changes):
    latents, pushes = changed(pipe, frames, **changes)
    assert np.array_equal(np.concatenate(pushes), plain[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[0], latents, strict=True))


def test_a_change_before_the_first_frame_is_another_start(pipe, frames):
    session = pipe.start("pencil", steps=3)
    session.set_options(steps=2, seed=5, noise_scale=0.4, sink_frames=2, motion_adaptive=False)
    cache = pipe.with_cache(sink_frames=2)
    other = pipe.start("pencil", steps=2, seed=5, noise_scale=0.4, cache=cache, motion_adaptive=False)
    assert np.array_equal(stream(session, frames[:21]), stream(other, frames[:21]))


# --- what the next chunk sees -------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (2, 1)])
def test_steps_change_on_the_cache_of_the_last_row(pipe, frames, before, after):
    """Oracle: the old cache itself, its last row copied to all others, under a new schedule."""
    session = pipe.start("pencil", steps=before)
    latents, chunks, work = record_latents(session), [], session._denoiser.work

    def record(chunk, switch=None):
        if chunk is not None:
            chunks.append(chunk)
        return work(chunk, switch)

    session._denoiser.work = record
    session.push(frames[:CHANGE_AFTER])
    session.set_options(steps=after)
    stream(session, frames[CHANGE_AFTER:])

    stepper = Stepper(NoiseSource(0, "fresh"), session._denoiser.sigma_of)
    rows = max(before, after)
    policy = SinkPolicy(pipe.preset.cache)
    cache = KVCache(
        pipe.transformer.config, policy, num_rows=rows, tokens_per_frame=session.cache.tokens_per_frame,
        dtype=torch.float64,
    )  # fmt: skip
    expected = []
    for steps, part in ((before, chunks[:6]), (after, chunks[6:])):
        schedule = StreamBatch(stepper, steps)
        for chunk in [*part, *[None] * steps]:
            expected += [e.latents for e in drive(schedule, pipe.engine, cache, chunk)]
        cache.fork(steps - 1, [row for row in range(rows) if row != steps - 1])
    assert len(latents) == len(expected) == 12
    for x, y in zip(latents, expected, strict=True):
        assert_close(x, y, rtol=0, atol=1e-9)  # slots are in another order: sums are rounded differently


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_shorter_window_is_the_long_one_trimmed(pipe, frames, window):
    """Oracle: the wide cache goes on, and before each chunk only the newest ``window - 1`` frames are kept."""
    wide = dict(steps=1, cache=pipe.with_cache(window_frames=6))
    latents, _ = changed(pipe, frames, wide, window_frames=window)
    session = pipe.start("pencil", **wide)
    expected = record_latents(session)
    session.push(frames[:CHANGE_AFTER])
    for start in range(CHANGE_AFTER, NUM_FRAMES, 4):
        session.cache.keep_recent(window - 1)
        session.push(frames[start : start + 4])
    untouched = changed(pipe, frames, wide)[0]
    assert (untouched[6] - expected[6]).abs().max() > 1e-3
    for x, y in zip(latents, expected, strict=True):
        assert_close(x, y, rtol=0, atol=1e-9)


def test_slots_after_a_change(pipe, frames):
    """Three sinks in place of one: the oldest frames still held become sinks; what is gone does not come back.

    25 frames are latent frames 0 … 6: the last row holds sink 0 and window 4 5 6 once all are out.
    """
    session = pipe.start("pencil", steps=2)
    session.push(frames[:CHANGE_AFTER])
    session.set_options(sink_frames=3, window_frames=2)
    session.push(frames[CHANGE_AFTER:29])
    slots = session.stats.cache_slots
    assert [(s["frame"], s["role"]) for s in slots] == [
        (0, "sink"), (4, "sink"), (5, "sink"), (6, "window"), (7, "window"),
    ]  # fmt: skip
    assert session.cache.num_rows == 2 and session.stats.cache_evicted == [3]
    session.push(frames[29:33])
    assert {s["frame"] for s in session.stats.cache_slots} == {0, 4, 5, 6, 7}  # row 1 lags by one chunk
    session.push(frames[33:37])
    assert {s["frame"] for s in session.stats.cache_slots} == {0, 4, 5, 7, 8}
    assert session.stats.cache_evicted == [6]


def test_carried_keys_are_those_of_the_last_row(pipe, frames):
    """Frame by frame, in every layer and every new row, before positions are applied."""
    session = pipe.start("pencil", steps=2)
    session.push(frames[:CHANGE_AFTER])
    session.flush()
    old = session.cache
    options = replace(session.options, steps=3, cache=pipe.with_cache(window_frames=5))
    session._run(session._denoiser._set_options(options))
    new = session.cache
    assert new is not old and new.num_rows == 3 and [f for f in new.tables[2].frames if f is not None] == [0, 4, 5, 6]
    width = new._k_time[0].shape[-1]
    for frame in (0, 4, 5, 6):
        (src,), (dst,) = old.tables[1].slots_of(frame), new.tables[0].slots_of(frame)
        for layer in range(2):
            for row in range(3):
                assert torch.equal(new.v[layer][row, dst], old.v[layer][1, src])
                assert torch.equal(new._k_time[layer][row, dst], old._k_time[layer][1, src])
                assert torch.equal(new.k[layer][row, dst, ..., width:], old.k[layer][1, src, ..., width:])
    assert not torch.equal(old.v[1][0, 1], old.v[1][1, 1])  # the rows did differ


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_prompt_switch_in_the_same_gap(pipe, frames, switch):
    """Both hold from the next chunk on, whichever was called first."""
    results = []
    for options_first in (True, False):
        session = pipe.start("pencil", steps=3)
        out = [session.push(frames[:CHANGE_AFTER])]
        calls = [
            lambda s=session: s.set_options(steps=2, window_frames=5),
            lambda s=session: s.set_prompt("ink", switch),
        ]
        for call in calls if options_first else reversed(calls):
            call()
        results.append(np.concatenate([*out, stream(session, frames[CHANGE_AFTER:])]))
    assert len(results[0]) == NUM_FRAMES and np.array_equal(*results)


@pytest.mark.parametrize("window", [2, 5])
def test_recache_after_a_change_rewrites_the_carried_frames(pipe, frames, window):
    """Kept inputs move with the cache: re-caching finds one for each frame the new row holds, and no other."""
    results = {}
    for switch in ("keep", "recache"):
        session = pipe.start("pencil", steps=2)
        session.push(frames[:CHANGE_AFTER])
        session.set_options(window_frames=window)
        session.set_prompt("ink", switch)
        results[switch] = session.push(frames[CHANGE_AFTER:29])
        for row, table in enumerate(session.cache.tables):
            assert set(session._denoiser._inputs[row]) == {f for f in table.frames if f is not None}
    assert not np.array_equal(results["keep"][-4:], results["recache"][-4:])


@pytest.mark.parametrize("changes", [dict(steps=1), dict(window_frames=5), dict(sink_frames=2), dict(seed=9)], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_goes_on(pipe, frames, policy, changes):
    """Whatever a policy keeps: no frame is lost, and where only the steps change its last row is what it was."""
    session = pipe.start("pencil", steps=2, policy=policy)
    session.push(frames[:29])  # frame 7 sits where frame 4 was: the ring is not in order
    session.flush()
    past = session.cache.tables[-1].copy()
    session._run(session._denoiser._set_options(replace(session.options, steps=1)))
    assert session.cache.tables[0] == past
    session.set_options(**changes)
    stream(session, frames[29:])
    assert session.stats.num_frames_out == NUM_FRAMES


def test_another_policy_starts_empty(pipe, frames):
    for policy in sorted(set(POLICIES) - {"sink"}):
        session = pipe.start("pencil", steps=2)
        session.push(frames[:CHANGE_AFTER])
        session.set_options(policy=policy)
        stream(session, frames[CHANGE_AFTER:29])
        assert session.cache.policy == POLICIES[policy](session.options.cache)
        assert {slot["frame"] for slot in session.stats.cache_slots} == {7}


@pytest.mark.parametrize(("clean_pass", "held"), [(False, {7}), (True, {0, 4, 5, 6, 7})])
def test_more_steps_after_a_single_one_start_empty(pipe, frames, clean_pass, held):
    """What a single step wrote is noisier than all that more steps write; only clean frames are carried over."""
    session = pipe.start("pencil", steps=1, schedule="sequential", clean_pass=clean_pass)
    session.push(frames[:CHANGE_AFTER])
    session.set_options(steps=2)
    session.push(frames[CHANGE_AFTER:29])
    assert {slot["frame"] for slot in session.stats.cache_slots if slot["frame"] is not None} <= held
    assert 7 in {slot["frame"] for slot in session.stats.cache_slots}
    assert clean_pass == (0 in {slot["frame"] for slot in session.stats.cache_slots})


def test_the_new_policy_says_which_switches_there_are(pipe, frames, monkeypatch):
    """Also in the gap before its first chunk, whichever way round."""

    class CutPolicy(SinkPolicy):
        switches = (*SinkPolicy.switches, "cut")

    monkeypatch.setitem(POLICIES, "cutting", CutPolicy)
    session = pipe.start("pencil")
    session.push(frames[:CHANGE_AFTER])
    session.set_options(policy="cutting")
    session.set_prompt("ink", "cut")
    session.set_options(policy="sink")
    with pytest.raises(ValueError, match="no rule for on_switch='cut'; use .*cutting"):
        session.set_prompt("ink", "cut")
    stream(session, frames[CHANGE_AFTER:])
    assert session.stats.num_frames_out == NUM_FRAMES


# --- memory -------------------------------------------------------------------------------------------------


def test_the_old_cache_is_freed_at_once(pipe, frames):
    """Without waiting for the garbage collector: on a GPU it may not come in time."""
    session = pipe.start("pencil", steps=4, cache=pipe.with_cache(window_frames=9))
    session.push(frames)
    gone, before = weakref.ref(session.cache), session.nbytes
    gc.disable()
    try:
        session.set_options(steps=1, window_frames=2)
        session.push(frames[:4])
        assert gone() is None
        assert session.nbytes < before / 5
        gone = weakref.ref(session.cache)
        session.close()
        assert gone() is None
    finally:
        gc.enable()


# --- any history --------------------------------------------------------------------------------------------

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(1, 4),
        "seed": st.integers(0, 3),
        "noise_scale": st.sampled_from([0.2, 0.6, 1.0]),
        "motion_adaptive": st.booleans(),
        "sink_frames": st.integers(0, 3),
        "window_frames": st.integers(1, 5),
        "positions": st.sampled_from(["packed", "absolute", "slots"]),
        "schedule": st.just("stream_batch"),
        "deadline_ms": st.sampled_from([None, 10.0]),
    },
).filter(lambda c: c.get("sink_frames", 1) + c.get("window_frames", 2) >= 2)
EVENTS = st.one_of(
    st.tuples(st.just("push"), st.integers(1, 9)),
    st.tuples(st.just("options"), CHANGES),
    st.tuples(st.just("prompt"), st.tuples(st.sampled_from(["ink", "oil paint"]), st.sampled_from(SWITCHES))),
    st.tuples(st.just("flush"), st.none()),
)


def play(pipe, frames, history, one_by_one):
    """All frames out; refused changes are skipped, pushes are cut into single frames on request."""
    session, out, start = pipe.start("pencil"), [], 0
    chunks = record_latents(session)  # asserts that every chunk leaves once and in order
    for kind, value in history:
        if kind == "push":
            cuts = [1] * value if one_by_one else [value]
            for length in cuts:
                out.append(session.push(np.take(frames, range(start, start + length), axis=0, mode="wrap")))
                start += length
        elif kind == "options":
            try:
                session.set_options(**value)
            except ValueError as error:
                assert "latent_frames_per_chunk" in str(error)  # sinks and window of two calls together hold one frame
        elif kind == "prompt":
            session.set_prompt(*value)
        else:
            out.append(session.flush())
    out.append(session.flush())
    assert session.schedule.num_in_flight == 0 and len(session._denoiser._noise_of) == 0
    assert sum(map(len, out)) == start == session.stats.num_frames_in == session.stats.num_frames_out
    return np.concatenate(out), len(chunks)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(history=st.lists(EVENTS, min_size=3, max_size=14))
def test_any_history(pipe, frames, history):
    """Frames out == frames in, in order, and however pushes are cut the same frames bit for bit."""
    out, num_chunks = play(pipe, frames, history, one_by_one=False)
    again, num_again = play(pipe, frames, history, one_by_one=True)
    assert num_chunks == num_again and np.array_equal(out, again)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_any_history_of_refused_and_empty_changes(pipe, frames, lengths, data):
    """A change refused, or to what already holds, leaves the stream bit for bit the plain one."""
    session, out = pipe.start("pencil"), []
    total = sum(lengths)
    clip = np.take(frames, range(total), axis=0, mode="wrap")
    starts = np.cumsum([0, *lengths])
    for begin, end in zip(starts, starts[1:], strict=False):
        wrong = data.draw(st.sampled_from([dict(steps=9), dict(width=128), dict(seed=1, noise_scale=2.0), dict(x=1)]))
        with pytest.raises(ValueError):
            session.set_options(**wrong)
        name = data.draw(st.sampled_from(["steps", "seed", "noise_scale", "cache", "policy", "schedule"]))
        session.set_options(**{name: getattr(session.options, name)})
        out.append(session.push(clip[begin:end]))
    assert np.array_equal(np.concatenate([*out, session.flush()]), stream(pipe.start("pencil"), clip))
