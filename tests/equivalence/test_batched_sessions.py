"""k sessions in one forward equal each alone, whoever joins, pauses or leaves at which tick.

The rows of a tick come from other streams, prompts, positions, schedules, noise levels and numbers of steps each
time; every other history runs them in two lanes. They are summed in another order than alone, hence a tolerance of
float64 rounding and not bit for bit.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import chain

import pytest
import torch
from random_pipeline import moving_frames, random_pipeline, record_latents
from torch.testing import assert_close

from streamdiff_core.lanes import Lanes
from streamdiff_core.lockstep import Lockstep

NUM_CHUNKS = 4
CLIPS = [moving_frames(1 + 4 * NUM_CHUNKS, seed=seed) for seed in range(3)]
PIECES = [slice(0, 5), *(slice(i, i + 4) for i in range(5, 4 * NUM_CHUNKS, 4))]
NUM_HISTORIES = 200
SETTINGS = [
    dict(steps=1),
    dict(steps=2, noise_scale=0.9),
    dict(steps=3),
    dict(steps=2, schedule="sequential", seed=3),
    dict(steps=3, schedule="sequential", clean_pass=True),
    dict(steps=2, input_options={"rcfg": {"scale": 1.2}}),
    dict(steps=2, policy="ema_sink"),
    dict(steps=2, latent_frames_per_chunk=1, positions="absolute"),
]


class User:
    """A stream with its settings: the same chunks whenever they are asked for."""

    def __init__(self, pipe, number):
        self.number, self.at = number, 0
        self.clip, options = CLIPS[number % len(CLIPS)], dict(SETTINGS[number % len(SETTINGS)])
        cache = {name: options.pop(name) for name in ("positions",) if name in options}
        self.session = pipe.start("pencil", cache=pipe.with_cache(**cache) if cache else None, **options)
        self.latents = record_latents(self.session)

    def next_work(self):
        """Its next chunk; the third has another prompt."""
        if self.at == 2:
            self.session.set_prompt("oil paint", "recache" if self.number % 2 else "keep")
        self.at += 1
        return self.session.work(self.clip[PIECES[self.at - 1]])


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def alone(pipe):
    """Latents of each stream, from forwards of its own."""
    users = [User(pipe, number) for number in range(24)]
    for user in users:
        for _ in range(NUM_CHUNKS):
            user.session._run(user.next_work())
    return [user.latents for user in users]


def test_random_histories(pipe, alone):
    """Wrong versions this catches: x0s handed back to the wrong stream, a stream's schedule advanced by another's
    tick, cache rows or prompts mixed up, state of one that left seen by the one that came.
    """
    rows_seen, largest_error = set(), 0.0
    forward, lanes = pipe.engine.forward, Lanes(2)
    for history in range(NUM_HISTORIES):
        rng = random.Random(history)
        steps = Lockstep(lambda rows: rows_seen.add(len(rows)) or forward(rows))
        inside, gone = [], []
        for _ in range(rng.randint(3, 7)):
            while len(inside) < 4 and rng.random() < 0.5:
                inside.append(User(pipe, rng.randrange(24)))
            if inside and rng.random() < 0.15:
                gone.append(inside.pop(rng.randrange(len(inside))))
                gone[-1].session.close()
            ready = [user for user in inside if user.at < NUM_CHUNKS and rng.random() < 0.8]
            rng.shuffle(ready)
            works = [user.next_work() for user in ready]
            parts = [works[::2], works[1::2]] if history % 2 else [works]
            results = chain(*lanes.run([partial(steps.run, part) for part in parts]))
            assert not [result for result in results if isinstance(result, Exception)]
        for user in inside + gone:
            for mine, expected in zip(user.latents, alone[user.number], strict=False):
                largest_error = max(largest_error, float((mine - expected).abs().max()))
    lanes.close()
    assert max(rows_seen) >= 6, "rows of several streams share forwards"
    assert largest_error < 1e-9


def test_a_work_alone_is_push_bit_for_bit(pipe):
    pushed, worked = User(pipe, 2), User(pipe, 2)
    for piece in PIECES:
        pushed.session.push(pushed.clip[piece])
        Lockstep(pipe.engine.forward).run([worked.session.work(worked.clip[piece])])
    assert len(pushed.latents) >= 2
    assert all(torch.equal(a, b) for a, b in zip(pushed.latents, worked.latents, strict=True))


def test_a_row_that_fails_takes_down_its_own_stream_only(pipe, alone):
    """The joint forward has already changed the caches of all when it fails: the others start from before it."""
    users = [User(pipe, number) for number in (1, 2, 9)]
    bad = users[1].session.cache
    told = []

    def forward(rows):
        x0s = pipe.engine.forward(rows)
        if any(cache is bad for cache, _ in rows) and users[0].at == 3:
            raise ZeroDivisionError("one row")
        return x0s

    steps = Lockstep(forward, on_split=told.append)
    for _ in range(2):
        steps.run([user.next_work() for user in users])
    failed = [type(result) for result in steps.run([user.next_work() for user in users])]
    assert failed.count(ZeroDivisionError) == 1 and failed[1] is ZeroDivisionError and len(told) == 1
    others = [users[0], users[2]]
    steps.run([user.next_work() for user in others])
    for user in others:
        assert len(user.latents) >= 3
        for mine, expected in zip(user.latents, alone[user.number], strict=False):
            assert_close(mine, expected, rtol=0, atol=1e-9)


def test_what_is_observed(pipe):
    """Encode and decode once per stream, denoise once per joint forward with its rows."""
    seen = []
    steps = Lockstep(pipe.engine.forward, observe=lambda *call: seen.append(call))
    users = [User(pipe, 1), User(pipe, 2)]
    for _ in range(4):
        seen.clear()
        steps.run([user.next_work() for user in users])
    stages = [(stage, rows, frames) for stage, rows, frames, _ in seen]
    assert sorted(stages) == [("decode", 1, 1)] * 2 + [("denoise", 5, 1)] + [("encode", 1, 1)] * 2
    assert all(ms > 0 for *_, ms in seen)
