"""N pipeline stages ≡ one process: same chunks, in order, before, during and after layers move (invariant 6).

Ranks are threads over gloo. With W ranks row r of a micro-batch holds chunk n - r * W instead of n - r, so batches
have other members than in one process and sums another order: 1e-9 in float64. One rank with W lanes forms the very
batches of W ranks, and to that the ring is equal bit for bit. What upstream gets wrong and is held here: W - 2 chunks
lost for W >= 3 (SPEC §6.6), eviction order forgotten when a layer moves (SPEC §6.4), un-denoised rows fed at the start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_pipeline import (
    RANDOM_PRESET,
    RELEASED_STEPS,
    moving_frames,
    random_modules,
    random_pipeline,
    record_latents,
    stream,
)
from ring import ring_of
from torch.testing import assert_close

from streamdiff_core import StreamPipeline
from streamdiff_core.config import CacheConfig, get_preset
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.parallel import stage
from streamdiff_core.parallel.block_scheduler import even_split
from streamdiff_core.pipeline import load_preset
from streamdiff_core.ring_engine import MAX_PROMPTS
from streamdiff_core.schedules import SCHEDULES

TOLERANCE = dict(rtol=0, atol=1e-9)
NUM_LAYERS = 5
PRESET = replace(RANDOM_PRESET, model=replace(RANDOM_PRESET.model, num_layers=NUM_LAYERS))
RELEASED = replace(RELEASED_STEPS, model=PRESET.model)
NUM_FRAMES = 55  # 5 + 12 * 4 + 2: 13 whole chunks and a padded one; the ring of slots wraps several times
NUM_CHUNKS = 14


@pytest.fixture(scope="module")
def frames():
    return moving_frames(NUM_FRAMES)


def ring(size, preset=PRESET, **options):
    return ring_of(size, preset, lambda: random_modules(preset), **options)


def watch(session, prompt="oil paint", switch=None, frames=None, at=26, **changes):
    """(latents per chunk, frames) of a stream, with a prompt switch or new options after ``at`` frames."""
    latents = record_latents(session)
    if switch is None and not changes:
        return latents, stream(session, frames)
    out = session.push(frames[:at])
    if switch:
        session.set_prompt(prompt, switch)
    if changes:
        session.set_options(**changes)
    return latents, np.concatenate([out, stream(session, frames[at:])])


def assert_close_streams(got, expected):
    assert len(got[0]) == len(expected[0]) and got[1].shape == expected[1].shape
    for a, b in zip(got[0], expected[0], strict=True):
        assert_close(a, b, **TOLERANCE)
    assert_close(got[1].astype(int), expected[1].astype(int), atol=1, rtol=0)  # 1e-9 may cross a rounding edge


def assert_same_streams(got, expected):
    assert len(got[0]) == len(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
    assert np.array_equal(got[1], expected[1])


CASES = [
    dict(steps=2),
    dict(steps=3, latent_frames_per_chunk=2),
    dict(steps=1),
    dict(steps=2, schedule="sequential"),
    dict(steps=2, schedule="sequential", clean_pass=True),
    dict(steps=2, cache=CacheConfig(sink_frames=2, window_frames=2, adaptive_sink="paper", adaptive_threshold=0.9)),
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items() if k != "cache"))
@pytest.mark.parametrize("preset", [PRESET, RELEASED], ids=["even steps", "released steps"])
def test_stages_equal_one_process(frames, preset, options):
    one = watch(random_pipeline(preset).start("pencil", **options), frames=frames)
    for size in (2, 3, 4):
        with ring(size, preset) as pipe:
            assert_close_streams(watch(pipe.start("pencil", **options), frames=frames), one)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_runs_on_stages(frames, name):
    """Those that cannot overlap take turns; what comes out is the same."""
    one = watch(random_pipeline(PRESET).start("pencil", steps=2, schedule=name), frames=frames)
    with ring(2) as pipe:
        assert_close_streams(watch(pipe.start("pencil", steps=2, schedule=name), frames=frames), one)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_runs_on_stages_or_says_that_it_cannot(frames, name):
    """Layers move in mid-stream with all that a policy keeps; where one layer decides for all, nothing starts."""
    options = dict(policy=name, cache=CacheConfig(sink_frames=2, window_frames=6, positions="packed"))
    with ring(2) as pipe:
        if POLICIES[name].across_layers:
            with pytest.raises(ValueError, match="lets one layer decide for all"):
                pipe.start("pencil", **options)
        else:
            moved = rebalanced(pipe, frames, [(3, 2), (1, 4), (4, 1)], **options)
            assert_close_streams(moved, watch(random_pipeline(PRESET).start("pencil", **options), frames=frames))


@pytest.mark.parametrize("knobs", [dict(cache_per_step=True), dict(step_lists=[[900, 600, 300], [800, 400]])], ids=str)
def test_knobs_of_sequential(frames, knobs):
    options = dict(steps=2, schedule="sequential", schedule_options=knobs)
    one = watch(random_pipeline(PRESET).start("pencil", **options), frames=frames)
    with ring(2) as pipe:
        assert_close_streams(watch(pipe.start("pencil", **options), frames=frames), one)


@pytest.mark.parametrize("size", [1, 2])
def test_guidance_is_refused(frames, size):
    """Stages answer later; a stream that is silently unguided would be worse. The ring goes on without it."""
    with ring(size) as pipe:
        with pytest.raises(ValueError, match="'rcfg' guides predictions.* run it in one process"):
            pipe.start("pencil", input_options=dict(rcfg={}))
        assert len(watch(pipe.start("pencil"), frames=frames)[1]) == len(frames)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_stages_equal_the_same_batches_in_one_process_bit_for_bit(frames, size):
    with ring(1, num_lanes=size) as pipe:
        one = watch(pipe.start("pencil", steps=3), frames=frames)
    with ring(size) as pipe:
        assert_same_streams(watch(pipe.start("pencil", steps=3), frames=frames), one)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_no_chunk_is_lost(frames, num_ranks, steps):
    """Row r of micro-step n holds chunk n - r * W; chunk 1 is finished in micro-step 1 + (S - 1) * W; all come out.

    Chunk 0 opens the stream alone, in S micro-steps. Upstream hands out from S * W - 1 on (SPEC §6.6).
    """
    with ring(num_ranks) as pipe:
        steps_seen, issue = [], pipe.engine.issue

        def record(rows, *args, **kwargs):
            steps_seen.append({row.step: row.chunk_idx for _, row in rows})
            return issue(rows, *args, **kwargs)

        pipe.engine.issue = record
        session = pipe.start("pencil", steps=steps)
        latents = record_latents(session)
        out = stream(session, frames)
    assert len(latents) == NUM_CHUNKS and out.shape == frames.shape  # in order: record_latents checks
    assert steps_seen[:steps] == [{step: 0} for step in range(steps)]
    last = NUM_CHUNKS - 1
    expected = [
        {row: n - row * num_ranks for row in range(steps) if 1 <= n - row * num_ranks <= last}
        for n in range(1, last + (steps - 1) * num_ranks + 1)
    ]
    assert steps_seen[steps:] == [rows for rows in expected if rows]
    assert steps_seen[steps:].index(next(s for s in steps_seen[steps:] if steps - 1 in s)) == (steps - 1) * num_ranks


@pytest.mark.parametrize("switch", ["keep", "recache", "flush", "reset"])
@pytest.mark.parametrize("schedule", ["stream_batch", "sequential"])
def test_prompt_switches_travel_with_the_chunks(frames, switch, schedule):
    options = dict(steps=2, schedule=schedule)
    one = watch(random_pipeline(PRESET).start("pencil", **options), switch=switch, frames=frames)
    kept = watch(random_pipeline(PRESET).start("pencil", **options), frames=frames)
    assert (one[0][-1] - kept[0][-1]).abs().max() > 1e-2  # the switch shows
    with ring(3) as pipe:
        assert_close_streams(watch(pipe.start("pencil", **options), switch=switch, frames=frames), one)


@pytest.mark.parametrize("prompt_bytes", [stage.PROMPT_BYTES, 1], ids=["room for all", "room for those in use"])
def test_more_prompts_than_the_ranks_remember(frames, monkeypatch, prompt_bytes):
    """A new prompt for every chunk, twice round: numbers are given again while old prompts are still under way."""
    monkeypatch.setattr(stage, "PROMPT_BYTES", prompt_bytes)

    def run(session):
        latents = record_latents(session)
        for i in range(40):
            session.set_prompt(f"prompt {i % 20}")
            session.push(frames[4 * (i % 10) : 4 * (i % 10) + 4])
        session.flush()
        return latents

    one = run(random_pipeline(PRESET).start("pencil", steps=3))
    with ring(3) as pipe:
        several = run(pipe.start("pencil", steps=3))
        assert len(pipe.engine.stage._contexts) == (1 if prompt_bytes == 1 else MAX_PROMPTS)  # last tick: one row
    assert len(one) == len(several) == 40
    for a, b in zip(several, one, strict=True):
        assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [dict(noise_scale=0.9, seed=4), dict(steps=3), dict(schedule="sequential"), dict(schedule="rolling_window")],
    ids=str,
)
def test_new_options_in_mid_stream(frames, changes):
    one = watch(random_pipeline(PRESET).start("pencil", steps=2), frames=frames, **changes)
    with ring(2) as pipe:
        assert_close_streams(watch(pipe.start("pencil", steps=2), frames=frames, **changes), one)


def rebalanced(pipe, frames, splits, **options):
    """A stream whose layers move after every third chunk."""
    session = pipe.start("pencil", **options)
    latents, out = record_latents(session), []
    for start in range(0, NUM_FRAMES, 12):
        out.append(session.push(frames[start : start + 12]))
        if splits:
            pipe.rebalance(splits.pop(0))
    return latents, np.concatenate([*out, session.flush()])


@pytest.mark.parametrize("options", [dict(steps=3), dict(steps=2, schedule="sequential", clean_pass=True)], ids=str)
def test_nothing_shows_when_layers_move(frames, options):
    """Also over two ranks at once, back again, and to a rank that had none; micro-batches are in flight meanwhile."""
    with ring(3) as pipe:
        still = rebalanced(pipe, frames, [], **options)
    with ring(3) as pipe:
        assert pipe.split == (2, 2, 1)
        moved = rebalanced(pipe, frames, [(0, 5, 0), (4, 0, 1), (1, 1, 3), (2, 2, 1)], **options)
        assert [r["layers"] for r in pipe.engine.report()] == [[0, 1], [2, 3], [4]]
        after = rebalanced(pipe, frames, [(0, 0, 5)], **options)
    assert_same_streams(moved, still)
    assert_same_streams(after, still)


def test_two_streams_share_a_ring_while_layers_move(frames):
    alone = [watch(random_pipeline(PRESET).start(p, seed=i, steps=i + 1), frames=frames) for i, p in enumerate("ab")]
    with ring(2) as pipe:
        sessions = [pipe.start(p, seed=i, steps=i + 1) for i, p in enumerate("ab")]
        latents, outs = [record_latents(s) for s in sessions], [[], []]
        for start in range(0, NUM_FRAMES, 11):
            for session, out in zip(sessions, outs, strict=True):
                out.append(session.push(frames[start : start + 11]))
            pipe.rebalance([(3, 2), (1, 4), (5, 0), (0, 5), (2, 3)][start // 11])
        for i, session in enumerate(sessions):
            got = latents[i], np.concatenate([*outs[i], session.flush()])
            assert_close_streams(got, alone[i])


def test_a_closed_stream_leaves_nothing_behind(frames):
    """Closed with chunks on their way; the next stream is as on a fresh ring, and no rank keeps a cache."""
    with ring(2) as pipe:
        expected = watch(pipe.start("pencil", steps=2), frames=frames)
    with ring(2) as pipe:
        with pipe.start("oil paint", steps=3) as first:
            first.push(frames[:30])
            weights = [r["nbytes"] for r in pipe.engine.report()]
        second = pipe.start("pencil", steps=2)
        assert_same_streams(watch(second, frames=frames), expected)
        second.close()
        assert len(pipe.engine.stage.caches) == 0
        assert all(a["nbytes"] < b for a, b in zip(pipe.engine.report(), weights, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bundled_model(size, seed):
    """The trained preset in float32: bit for bit against the same batches, within a grey level against one process."""
    preset = get_preset("tiny")
    clip = moving_frames(33, seed, 128, 128)

    def modules():
        return load_preset(preset, device="cpu", dtype="float32")

    def run(pipe, **options):
        session = pipe.start("graphite pencil sketch", width=128, height=128, **options)
        latents = record_latents(session)
        return latents, stream(session, clip)

    with ring_of(1, preset, modules, num_lanes=size) as pipe:
        lanes = run(pipe)
    with ring_of(size, preset, modules, split=even_split(6, size)) as pipe:
        assert_same_streams(run(pipe), lanes)
        pipe.rebalance((6, *[0] * (size - 1)))
        assert_same_streams(
            run(pipe, schedule="sequential"),
            run(StreamPipeline.from_modules(preset, *modules()), schedule="sequential"),
        )
    one = run(StreamPipeline.from_modules(preset, *modules()))
    assert np.abs(lanes[1].astype(int) - one[1]).max() <= 1


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, torch
torch.set_num_threads(1)
from random_pipeline import *
from test_stages import PRESET
from streamdiff_core.parallel_pipeline import join_modules, links_from_environment
pipe = join_modules(PRESET, *random_modules(PRESET), links_from_environment("cpu"))
if pipe is not None:
    with pipe, pipe.start("pencil", steps=2) as session:
        frames = moving_frames(55)
        out = session.push(frames[:26])
        pipe.rebalance((1, 4))
        np.save(sys.argv[1], np.concatenate([out, stream(session, frames[26:])]))
"""


@pytest.mark.slow
def test_torchrun(frames, tmp_path):
    """Two real processes started by torchrun, layers moving in mid-stream."""
    here = Path(__file__).resolve().parent
    script, result = tmp_path / "ranks.py", tmp_path / "out.npy"
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parent), str(here.parent.parent)]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(result),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with ring(1, num_lanes=2) as pipe:
        expected = stream(pipe.start("pencil", steps=2), frames)
    assert np.array_equal(np.load(result), expected)
