"""Memory of full-size presets: the closed figures against the real modules, counted on the meta device."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamdiff_core import StreamPipeline
from streamdiff_core.config import PRESETS, get_preset
from streamdiff_core.engine import Engine
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.memory_need import PROMPT_BYTES, SPARE_BYTES, VAES, memory_need, ways_to_fit
from streamdiff_core.taehv import TAEHV
from streamdiff_core.types import RowOp

META = torch.device("meta")
GB = 1_000_000_000


class Live(TorchDispatchMode):
    """Most bytes alive at a time of what is allocated inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) and x.is_meta else None
            if storage is not None and storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key, size):
        self._known.discard(key)
        self.now -= size


def real_vae(name):
    if name == "taehv":
        with META:
            return TAEHV().bfloat16()
    diffusers = pytest.importorskip("diffusers")
    from streamdiff_core.wan_vae import WanVAE

    with META:
        return WanVAE(diffusers.AutoencoderKLWan()).bfloat16()


@pytest.mark.parametrize("name", VAES)
@torch.inference_mode()
def test_vae_figures_are_those_of_the_modules(name):
    vae, (height, width) = real_vae(name), (480, 832)
    state, work = vae.new_state(), 0
    for length in (5, 4, 4):
        work = 0  # of a steady chunk: the first one is larger, but has no memory yet
        with Live() as live:
            latents = vae.encode(torch.zeros(1, length, 3, height, width, device=META), state)
        work = max(work, live.peak)
        with Live() as live:
            vae.decode(latents, state)
        work = max(work, live.peak)
    weights, per_pixel, work_per_pixel = VAES[name]
    assert sum(p.numel() * p.element_size() for p in vae.parameters()) == weights
    assert state.nbytes == pytest.approx(per_pixel * height * width, rel=1e-3)
    assert work == pytest.approx(work_per_pixel * height * width, rel=2e-3)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "self-forcing-1.3b"])
@torch.inference_mode()
def test_weights_cache_and_room_of_the_transformer(name):
    preset, rows = get_preset(name), 2 if name.startswith("wan") else 1
    transformer = empty_transformer(preset, torch.bfloat16)
    cache = KVCache(
        preset.model, POLICIES["sink"](preset.cache), num_rows=rows, tokens_per_frame=1560, dtype=torch.bfloat16,
        device=META,
    )  # fmt: skip
    need = memory_need(preset, steps=2, vae="taehv")
    weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
    prompt = transformer.encode_prompt(torch.zeros(1, 512, 4096, device=META))
    assert need.weights_bytes == need.load_bytes == weights + VAES["taehv"][0]
    assert need.cache_bytes == cache.nbytes
    assert PROMPT_BYTES - prompt.nbytes < need.stream_bytes - VAES["taehv"][1] * 480 * 832 <= PROMPT_BYTES
    frames = preset.latent_frames_per_chunk
    xt = torch.zeros(frames, 16, 60, 104, device=META)
    ops = [
        (cache, RowOp(xt=xt, sigma=0.5, timestep=500.0, frame_ids=tuple(range(frames)), cache_row=row, chunk_idx=0,
                      step=row, prompt=prompt))
        for row in range(rows)
    ]  # fmt: skip
    engine = Engine(transformer.fuse())
    with Live() as live:
        engine.forward(ops)
    assert live.peak <= need.work_bytes - SPARE_BYTES


def test_14b_by_hand():
    """28.6 GB of weights, 9.0 per row of cache (keys, values, and the temporal 44 of 128 columns again)."""
    needs = [memory_need(get_preset("wan-14b"), steps=steps) for steps in (1, 2, 3, 4)]
    assert [round(n.total_bytes / GB) for n in needs] == [47, 56, 65, 74]
    assert needs[0].weights_bytes == 2 * 14_288_491_584 + VAES["wan"][0]
    assert needs[3].cache_bytes == 4 * needs[0].cache_bytes == 4 * 40 * 6 * 1560 * 40 * (2 * 128 + 44) * 2


def test_quantised_weights_take_about_half_but_are_loaded_whole():
    plain, small = (memory_need(get_preset("wan-14b"), steps=1, quantisation=q) for q in (None, "int8"))
    assert 0.5 < small.weights_bytes / plain.weights_bytes < 0.53
    assert small.load_bytes == plain.load_bytes
    tight = memory_need(get_preset("wan-14b"), steps=1, quantisation="int8", size=(256, 256), vae="taehv")
    assert tight.total_bytes == tight.load_bytes
    assert str(tight).startswith("29 GB (loading 28.6, then weights 14.") and "loading" not in str(plain)


def test_ways_to_fit_are_the_smallest_sets_of_changes():
    preset = get_preset("wan-1.3b")
    assert ways_to_fit(preset, 12 * GB) == ["a TAEHV as vae (10 GB)"]
    assert all(" with " in way for way in ways_to_fit(preset, 9 * GB)) and ways_to_fit(preset, 9 * GB)
    assert ways_to_fit(preset, 1 * GB) == []
    assert ways_to_fit(preset, 11 * GB, vae="wan") == ways_to_fit(preset, 11 * GB)


def test_every_full_size_preset_can_be_counted():
    for preset in PRESETS.values():
        if preset.source:
            assert 14 * GB < memory_need(preset).total_bytes < 48 * GB


def test_prompts_kept_on_the_device_are_bounded_by_bytes(monkeypatch):
    """64 prompts of the 14B model would be 27 GB."""
    from streamdiff_core import pipeline

    pipe = StreamPipeline.from_preset("tiny", device="cpu", dtype="float32")
    size = pipe.encode_prompt("a").nbytes
    monkeypatch.setattr(pipeline, "PROMPT_BYTES", 3 * size)
    for word in "bcdef":
        pipe.encode_prompt(word)
    assert [key[0][0] for key in pipe._prompts] == list("def")
    monkeypatch.setattr(pipeline, "PROMPT_BYTES", 0)
    assert pipe.encode_prompt("g") is pipe.encode_prompt("g"), "the one in use stays"
