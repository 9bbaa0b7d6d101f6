"""Full-size forwards as a GPU would run them, on the meta device: nothing waits for the device, shapes never change.

Meta tensors hold no numbers, so whatever looks at one (``.item()``, ``if tensor``, ``.cpu()``) raises; what goes the
other way is recorded and has to be asynchronous. A blocking copy in each of 30 layers costs more than the layers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamdiff_core.config import CacheConfig, get_preset
from streamdiff_core.engine import Engine
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.rope import spatial_rotation, temporal_rotation
from streamdiff_core.types import RowOp

META = torch.device("meta")
HEIGHT, WIDTH, TOKENS = 60, 104, 1560  # 480p


class Copies(TorchDispatchMode):
    """Counts operations, and those that cross between devices; ``waits`` are those that block."""

    def __init__(self):
        super().__init__()
        self.waits, self.num_copies, self.num_ops = [], 0, 0
        self.shapes, self.offsets = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.dim()}
        self.num_ops += 1
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.shapes.append((str(func), [(tuple(x.shape), x.stride(), x.dtype) for x in made]))
        self.offsets.append([x.storage_offset() for x in made])
        if len(places) > 1:
            self.num_copies += 1
            if not (kwargs or {}).get("non_blocking", "copy_" in str(func) and args[2:] == (True,)):
                self.waits.append(str(func))
        return out


class MadeThere(TorchFunctionMode):
    """``torch.tensor(values, device=...)`` copies behind the dispatcher's back, and blocks."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu") == META:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


def forwards(preset, policy="sink", count=10, rows=2):
    """Watched forwards of a stream batch: (copies, tensors made on the device) of each."""
    for cached in (spatial_rotation, temporal_rotation):
        cached.cache_clear()
    transformer = empty_transformer(preset, torch.bfloat16).requires_grad_(False).fuse()
    engine = Engine(transformer)
    prompt = engine.encode_prompt(torch.zeros(1, 512, 4096, device=META))
    cache = KVCache(
        preset.model, POLICIES[policy](preset.cache), num_rows=rows, tokens_per_frame=TOKENS,
        dtype=torch.bfloat16, device=META,
    )  # fmt: skip
    for frame in range(count):
        xt = torch.zeros(1, 16, HEIGHT, WIDTH, device=META)
        ops = [
            (cache, RowOp(xt=xt, sigma=0.5, timestep=500.0, frame_ids=(frame,), cache_row=row, chunk_idx=frame,
                          step=row, prompt=prompt))
            for row in range(rows)
        ]  # fmt: skip
        with MadeThere() as made, Copies() as copies:
            x0s = engine.forward(ops)
        assert {x.shape for x in x0s} == {xt.shape} and all(x.is_meta for x in x0s)
        yield copies, made


def with_layers(name, count=6):
    """A preset with fewer layers of its full width: what each of them copied would still be seen."""
    preset = get_preset(name)
    return replace(preset, model=replace(preset.model, num_layers=count))


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b"])
def test_forward_at_480p_never_waits(name):
    """At most one small copy to the device besides the timesteps: the rotation of a position not seen before."""
    for copies, made in forwards(with_layers(name)):
        assert not copies.waits and not made.waits
        assert copies.num_copies <= 3


def test_steady_state_repeats_the_same_operations():
    """From a full cache on every forward starts the same kernels with the same shapes, and every third one in the same
    places: a window of three slots is written in turn. Three recorded CUDA graphs would therefore be a whole stream."""
    preset = with_layers("wan-1.3b")
    packed = replace(preset, cache=replace(preset.cache, positions="packed"))
    seen = [c for c, _ in forwards(packed, count=17)][10:]  # the cache is full and every slot has been at every place
    assert [c.num_copies for c in seen] == [1] * 7, "the timesteps"
    assert all(c.shapes == seen[0].shapes for c in seen)
    assert all(a.offsets == b.offsets for a, b in zip(seen, seen[3:], strict=False))
    assert seen[0].offsets != seen[1].offsets, "the slot does change"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies(policy):
    cache = CacheConfig(sink_frames=2, window_frames=6, positions="packed")
    small = replace(with_layers("wan-1.3b", 2), cache=cache)
    watched = forwards(small, policy, count=14)
    if policy == "slow_fast":  # which frame it merges depends on their numbers
        with pytest.raises(RuntimeError, match="item.. cannot be called on meta"):
            list(watched)
        return
    for copies, made in watched:
        assert not copies.waits and not made.waits


def test_streaming_vae_at_480p_never_waits():
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLWan

    from streamdiff_core.wan_vae import WanVAE

    with META:
        vae = WanVAE(AutoencoderKLWan()).bfloat16()
    state, counts = vae.new_state(), []
    for length in (5, 4, 4, 4):
        with MadeThere() as made, Copies() as copies:
            latents = vae.encode(torch.zeros(1, length, 3, 480, 832, device=META), state)
            frames = vae.decode(latents, state)
        assert latents.shape == (1, (length + 3) // 4, 16, HEIGHT, WIDTH) and frames.shape == (1, length, 3, 480, 832)
        assert not made.waits and not copies.num_copies
        counts.append(copies.num_ops)
    assert len(set(counts[1:])) == 1
