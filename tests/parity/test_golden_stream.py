"""Sixteen streamed calls (6-frame cache, 3 sinks, ring long since wrapped) against the recorded reference."""

import json

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core import flow
from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies.sink import SinkPolicy
from streamdiff_core.weights import load_checkpoint

# float32 sums in another order: 4e-6 measured. A frame in a wrong slot or at a wrong position shows at 1e-2.
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def replay(golden_dir):
    """(recorded call, velocity, cache slots after it) for every call."""
    from safetensors.torch import load_file

    c = json.loads((golden_dir / "a_tiny_wan_config.json").read_text())
    same = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    model = CausalWanTransformer(ModelConfig(**{name: c[name] for name in same})).requires_grad_(False)
    load_checkpoint(model, golden_dir / "a_tiny_wan.safetensors")
    calls = json.loads((golden_dir / "c3_stream_sink3_noadapt.json").read_text())["calls"]
    tensors = load_file(golden_dir / "c3_stream_sink3_noadapt.safetensors")
    policy = SinkPolicy(CacheConfig(sink_frames=3, window_frames=3, positions="absolute"))
    cache = KVCache(model.config, policy, num_rows=1, tokens_per_frame=15)
    prompt = model.encode_prompt(tensors["context"])
    results = []
    for call in calls:
        prefix = f"call{call['call']:02d}."
        recorded = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        ids = range(call["start_frame"], call["start_frame"] + call["frames"])
        velocity = model(recorded["x"].transpose(1, 2), recorded["t"], prompt, [cache.begin(0, ids)])
        slots = {f"layer{i}.k": cache.k[i].flatten(1, 2).clone() for i in (0, 2)}
        slots |= {f"layer{i}.v": cache.v[i].flatten(1, 2).clone() for i in (0, 2)}
        results.append((recorded, velocity, slots))
    return results


def test_the_recording_really_wraps(replay):
    """17 latent frames through 6 slots: the three rolling slots are each overwritten several times.

    Different contents per slot, zeros included: slots 0 and 1 are filled by the first call, slot 2 by the
    second; slot 3 holds frames 3 6 9 12 15, slot 4 holds 4 7 10 13 16, slot 5 holds 5 8 11 14.
    """
    wanted = [1, 1, 2, 6, 6, 5]
    assert sum(recorded["x"].shape[2] for recorded, _, _ in replay) == 17
    for slot in range(6):
        rows = slice(15 * slot, 15 * (slot + 1))
        seen = torch.stack([recorded["layer0.v"][0, rows] for recorded, _, _ in replay])
        assert len(seen.flatten(1).unique(dim=0)) == wanted[slot], slot


def test_velocity(replay):
    for recorded, velocity, _ in replay:
        assert_close(velocity.transpose(1, 2), recorded["flow"], **TOLERANCE)


def test_x0(replay):
    """The noise level is the table's entry nearest to the timestep, as in the reference."""
    table = flow.sigma_table()
    for recorded, velocity, _ in replay:
        sigma = flow.nearest_table_sigma(recorded["t"], table)
        x0 = flow.x0_from_velocity(recorded["x"].transpose(1, 2), velocity, sigma)
        assert_close(x0.transpose(1, 2), recorded["x0"], **TOLERANCE)


@pytest.mark.parametrize("name", ["layer0.k", "layer0.v", "layer2.k", "layer2.v"])
def test_cache_after_each_call(replay, name):
    """Same slots, same rotation, empty slots still zero."""
    for number, (recorded, _, slots) in enumerate(replay):
        assert_close(slots[name], recorded[name], msg=lambda m, n=number: f"call {n}: {m}", **TOLERANCE)
