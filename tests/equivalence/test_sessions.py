"""A session owns its stream: no other session, before it or beside it, changes a bit of its output.

Upstream keeps ring indices on the attention modules, edits the shared step list in place and feeds all users
through one queue, so a second session sees the first (SPEC §2.8-1, §3, §7). Alone means batch 1, so equal
means bit for bit. Rows of several sessions in one forward: ``test_batched_sessions``.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from random_pipeline import (
    RANDOM_PRESET,
    RELEASED_STEPS,
    moving_frames,
    random_pipeline,
    record_latents,
    stream,
)

NUM_FRAMES = 38
OPTIONS_A = dict(seed=1, steps=2)
OPTIONS_B = dict(seed=2, steps=3, noise_scale=0.9)


@pytest.fixture(scope="module")
def clips():
    return moving_frames(NUM_FRAMES, seed=1), moving_frames(NUM_FRAMES, seed=2)


def fresh(preset, clip, prompt, **options):
    """Latents and frames of the stream on a pipeline that has never been used."""
    session = random_pipeline(preset).start(prompt, **options)
    return record_latents(session), stream(session, clip)


def assert_same(latents, out, expected):
    assert len(latents) == len(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(latents, expected[0], strict=True))
    assert np.array_equal(out, expected[1])


@pytest.mark.parametrize("preset", [RANDOM_PRESET, RELEASED_STEPS], ids=["even steps", "released steps"])
def test_second_session_equals_a_fresh_pipeline(preset, clips):
    """Also after one that ended mid-chunk, switched its prompt, filled its ring or was reset."""
    expected = fresh(preset, clips[1], "pencil", **OPTIONS_A)
    pipe = random_pipeline(preset)
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    with pipe.start("oil paint", **OPTIONS_B) as first:
        first.push(clips[0][:23])
        first.set_prompt({"pencil": 0.5, "charcoal": 0.5}, "recache")
        first.push(clips[0][23:])
        first.set_prompt("pencil", "reset")
        first.push(clips[0][:7])
    second = pipe.start("pencil", **OPTIONS_A)
    latents = record_latents(second)
    assert_same(latents, stream(second, clips[1]), expected)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_second_session_equals_a_fresh_process(clips):
    """The same frames from a Python process that did nothing else."""
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(1);"
        "from random_pipeline import *;"
        f"session = random_pipeline().start('pencil', **{OPTIONS_A});"
        f"out = stream(session, moving_frames({NUM_FRAMES}, seed=1));"
        "sys.stdout.buffer.write(out.tobytes())"
    )
    tests = Path(__file__).resolve().parent.parent
    path = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}];"
    process = subprocess.run([sys.executable, "-c", path + code], capture_output=True, check=True)
    other = np.frombuffer(process.stdout, np.uint8).reshape(clips[0].shape)
    pipe = random_pipeline()
    stream(pipe.start("oil paint", **OPTIONS_B), clips[1])
    ours = stream(pipe.start("pencil", **OPTIONS_A), clips[0])
    assert np.array_equal(other, ours)


@pytest.mark.parametrize("preset", [RANDOM_PRESET, RELEASED_STEPS], ids=["even steps", "released steps"])
def test_interleaved_sessions_equal_each_alone(preset, clips):
    """Two users take turns on one pipeline, with other prompts, seeds, steps and pieces of other lengths.

    Upstream's shared queue hands chunks out as they come and mixes the two clips; its step list, edited in
    place, carries one user's first timestep to the other (SPEC §3, §6.6, §7).
    """
    alone = [
        fresh(preset, clips[0], "pencil", **OPTIONS_A),
        fresh(preset, clips[1], "oil paint", **OPTIONS_B),
    ]
    pipe = random_pipeline(preset)
    sessions = [pipe.start("pencil", **OPTIONS_A), pipe.start("oil paint", **OPTIONS_B)]
    latents, outs, at = [record_latents(s) for s in sessions], [[], []], [0, 0]
    for i, length in [(0, 3), (1, 9), (0, 8), (1, 1), (0, 1), (1, 5), (0, 20), (1, 23), (0, 6)]:
        outs[i].append(sessions[i].push(clips[i][at[i] : at[i] + length]))
        at[i] += length
    assert at == [NUM_FRAMES, NUM_FRAMES]
    for i, session in enumerate(sessions):
        outs[i].append(session.flush())
        assert_same(latents[i], np.concatenate(outs[i]), alone[i])


def test_noise_belongs_to_seed_chunk_and_step(clips):
    """Another user's draws, or the global generator, change nothing; another seed changes everything."""
    pipe = random_pipeline()
    first = stream(pipe.start("pencil", seed=5), clips[0])
    torch.manual_seed(99)
    torch.randn(7)
    state = torch.get_rng_state()
    assert np.array_equal(stream(pipe.start("pencil", seed=5), clips[0]), first)
    assert torch.equal(torch.get_rng_state(), state)  # and a stream leaves the global generator alone
    assert not np.array_equal(stream(pipe.start("pencil", seed=6), clips[0]), first)


def test_presets_and_options_are_not_edited(clips):
    """Upstream writes each chunk's first timestep into the configured list; ours is frozen and stays as it
    was.
    """
    pipe = random_pipeline(RELEASED_STEPS)
    session = pipe.start("pencil", **OPTIONS_A)
    seen = [session.encode_chunk(clips[0][:5]).chunk.timesteps]
    seen += [session.encode_chunk(clips[0][i : i + 4]).chunk.timesteps for i in range(5, 37, 4)]
    assert len({t[0] for t in seen}) > 3 and {t[1:] for t in seen} == {(500.0,)}
    assert pipe.preset == RELEASED_STEPS and pipe.preset.schedule.timesteps == (700.0, 500.0, 400.0, 200.0)
    for config in (pipe.preset, pipe.preset.schedule, session.options):
        with pytest.raises(AttributeError):
            setattr(config, fields(config)[0].name, None)
