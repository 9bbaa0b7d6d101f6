"""Works in lockstep: where a joint forward fails, each stream goes on as if it had been alone all the time."""

from __future__ import annotations

import pytest
import torch
from random_pipeline import RANDOM_PRESET, random_modules

from streamdiff_core.config import CacheConfig
from streamdiff_core.engine import Engine
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import make_policy
from streamdiff_core.lockstep import Lockstep, run_alone
from streamdiff_core.types import RowOp


@pytest.fixture(scope="module")
def engine():
    return Engine(random_modules(RANDOM_PRESET)[0].eval().requires_grad_(False))


def new_cache(engine):
    policy = make_policy("ema_sink", CacheConfig(sink_frames=1, window_frames=2))
    return KVCache(engine.transformer.config, policy, num_rows=1, tokens_per_frame=4, dtype=torch.float64)


def work(cache, prompt, seed):
    """Six chunks of one latent frame, so that frames leave the window and are mixed into the sink."""
    noise, x0s = torch.Generator().manual_seed(seed), []
    for frame in range(6):
        xt = torch.randn(1, 6, 4, 4, generator=noise).double()
        row = RowOp(
            xt=xt, sigma=0.5, timestep=500.0, frame_ids=(frame,), cache_row=0, chunk_idx=frame, step=0, prompt=prompt
        )
        x0s += yield [(cache, row)]
    return torch.stack(x0s)


def test_a_failed_joint_forward_leaves_no_trace(engine, monkeypatch):
    """Its cache decisions are taken back: taken twice, the second time would not move what left the window."""
    prompts = [engine.encode_prompt(torch.randn(1, 4, 16, dtype=torch.float64)) for _ in "ab"]
    alone = [run_alone(work(new_cache(engine), p, seed), engine.forward) for seed, p in enumerate(prompts)]
    transformer, num_failed = engine.transformer.forward, [0]

    def fail_together(xt, *args):
        if len(xt) > 1:
            num_failed[0] += 1
            raise RuntimeError("one row is bad")
        return transformer(xt, *args)

    monkeypatch.setattr(engine.transformer, "forward", fail_together)
    told = []
    lockstep = Lockstep(engine.forward, on_split=told.append)
    results = lockstep.run([work(new_cache(engine), p, seed) for seed, p in enumerate(prompts)])
    assert num_failed[0] == len(told) == 6
    assert all(torch.equal(result, solo) for result, solo in zip(results, alone, strict=True))
