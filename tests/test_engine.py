"""Rows of any mix in one forward: each gets what it would get alone, in order, with one cache decision
each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_pipeline import RANDOM_PRESET, random_modules
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig
from streamdiff_core.engine import Engine
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import SinkPolicy
from streamdiff_core.types import RowOp

TOLERANCE = dict(rtol=0, atol=1e-12)  # float64; batched products sum in another order


@pytest.fixture(scope="module")
def model():
    return random_modules(RANDOM_PRESET)[0].eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(model):
    return [model.encode_prompt(torch.randn(1, 4, 16, dtype=torch.float64)) for _ in range(3)]


def new_cache(model, num_rows=1):
    policy = SinkPolicy(CacheConfig(sink_frames=1, window_frames=3, positions="packed"))
    return KVCache(model.config, policy, num_rows=num_rows, tokens_per_frame=4, dtype=torch.float64)


def make_row(seed, frames, prompt, cache_row=0, sigma=0.5, timestep=500.0):
    xt = torch.randn(len(frames), 6, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    return RowOp(
        xt=xt, sigma=sigma, timestep=timestep, frame_ids=tuple(frames), cache_row=cache_row,
        chunk_idx=seed, step=0, prompt=prompt,
    )  # fmt: skip


def test_x0_from_the_model_s_velocity(model, prompts):
    row = make_row(1, [0, 1], prompts[0], sigma=0.3, timestep=300.0)
    (x0,) = Engine(model).forward([(new_cache(model), row)])
    view = new_cache(model).begin(0, (0, 1))
    velocity = model(row.xt[None], torch.full((1, 2), 300.0, dtype=torch.float64), [prompts[0]], [view])[0]
    assert_close(x0, row.xt - 0.3 * velocity, **TOLERANCE)
    assert x0.shape == row.xt.shape and not x0.requires_grad


def test_each_latent_frame_at_its_own_level(model, prompts):
    """A row of frames at mixed levels: x0 of each with its own sigma, the model told each timestep."""
    row = make_row(1, [0, 1], prompts[0], sigma=(0.3, 0.8), timestep=(300.0, 800.0))
    (x0,) = Engine(model).forward([(new_cache(model), row)])
    told = torch.tensor([[300.0, 800.0]], dtype=torch.float64)
    velocity = model(row.xt[None], told, [prompts[0]], [new_cache(model).begin(0, (0, 1))])[0]
    assert_close(x0[0], row.xt[0] - 0.3 * velocity[0], **TOLERANCE)
    assert_close(x0[1], row.xt[1] - 0.8 * velocity[1], **TOLERANCE)


def test_mixed_rows_equal_rows_alone(model, prompts):
    """Two streams, three prompts, other levels, positions, lengths and fill levels; twice, so that caches
    matter.
    """

    def rows(offset):
        return [
            make_row(10 + offset, [5 + offset], prompts[0], 0, 0.7, 700.0),
            make_row(20 + offset, [2 * offset, 2 * offset + 1], prompts[1], 0, 0.2, 200.0),  # another shape
            make_row(30 + offset, [offset], prompts[2], 1, 0.5, 500.0),
            make_row(40 + offset, [9 + offset], prompts[1], 2, 0.9, (900.0,)),
        ]

    owner = [0, 1, 0, 0]
    together, alone = ([new_cache(model, 3), new_cache(model)] for _ in "ab")
    engine = Engine(model)
    for offset in range(4):
        batch = engine.forward([(together[o], row) for o, row in zip(owner, rows(offset), strict=True)])
        for o, row, x0 in zip(owner, rows(offset), batch, strict=True):
            (solo,) = engine.forward([(alone[o], row)])
            assert_close(x0, solo, **TOLERANCE)
    for a, b in zip(together, alone, strict=True):
        for x, y in zip([*a.k, *a.v], [*b.k, *b.v], strict=True):
            assert_close(x, y, **TOLERANCE)


def test_one_batch_per_shape(model, prompts, monkeypatch):
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda xt, *a: shapes.append(tuple(xt.shape[:2])) or forward(xt, *a))
    cache = new_cache(model, 4)
    rows = [make_row(r, [0, 1] if r == 2 else [0], prompts[0], r) for r in range(4)]
    Engine(model).forward([(cache, row) for row in rows])
    assert sorted(shapes) == [(1, 2), (3, 1)]


def test_one_timestep_per_frame(model, prompts):
    """A tuple gives each latent frame its own timestep, as the re-cache of a prompt switch needs."""
    engine, frames = Engine(model), [0, 1]
    uniform = engine.forward([(new_cache(model), make_row(1, frames, prompts[0], timestep=500.0))])[0]
    same = engine.forward([(new_cache(model), make_row(1, frames, prompts[0], timestep=(500.0, 500.0)))])[0]
    other = engine.forward([(new_cache(model), make_row(1, frames, prompts[0], timestep=(500.0, 100.0)))])[0]
    assert torch.equal(uniform, same)
    assert (other - same).abs().max() > 1e-3


def test_one_decision_per_row(model, prompts, monkeypatch):
    """The policy is asked once per row and forward, not once per layer (SPEC §2.6-e)."""
    asked, plan = [], SinkPolicy.plan
    monkeypatch.setattr(SinkPolicy, "plan", lambda self, *a: asked.append(a[1]) or plan(self, *a))
    cache = new_cache(model, 2)
    Engine(model).forward([(cache, make_row(r, [r], prompts[0], r)) for r in range(2)])
    assert asked == [(0,), (1,)] and model.config.num_layers > 1


def test_two_rows_of_one_cache_row_are_refused(model, prompts):
    cache = new_cache(model, 2)
    rows = [(cache, make_row(1, [0], prompts[0])), (cache, make_row(2, [1], prompts[0]))]
    with pytest.raises(ValueError, match="same cache row"):
        Engine(model).forward(rows)
    assert cache.tables[0].num_filled == 0  # refused before anything was written
    Engine(model).forward([(new_cache(model), row) for _, row in rows])  # same row number of two streams is fine


def test_x0_model_under_bfloat16_keeps_float32_latents(prompts):
    """The transformer may compute in bfloat16; noise levels, velocity and x0 stay in float32."""
    preset = replace(RANDOM_PRESET, model=replace(RANDOM_PRESET.model, prediction="x0"))
    model = random_modules(preset)[0].eval().requires_grad_(False).to(torch.bfloat16)
    prompt = model.encode_prompt(torch.randn(1, 4, 16))
    policy = SinkPolicy(CacheConfig(sink_frames=1, window_frames=3, positions="packed"))
    cache = KVCache(model.config, policy, num_rows=1, tokens_per_frame=4, dtype=torch.bfloat16)
    row = make_row(1, [0], prompt)
    row.xt = row.xt.float()
    (x0,) = Engine(model).forward([(cache, row)])
    assert x0.dtype == torch.float32 and x0.isfinite().all()
    assert not torch.equal(x0, x0.bfloat16().float())
