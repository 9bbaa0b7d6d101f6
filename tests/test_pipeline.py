"""The pipeline: loading a preset, what ``start`` takes and refuses, prompts and their mixes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_pipeline import (
    RANDOM_PRESET,
    RELEASED_STEPS,
    moving_frames,
    random_modules,
    random_pipeline,
    stream,
)
from safetensors.torch import save_file
from torch.testing import assert_close

from streamdiff_core import config, pipeline
from streamdiff_core.config import CacheConfig
from streamdiff_core.pipeline import StreamPipeline, pick_device, pick_dtype
from streamdiff_core.types import CheckpointError


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(steps=0), "steps must be between 1 and 4, got 0"),
        (dict(steps=5), "steps must be between 1 and 4, got 5"),
        (dict(noise_scale=0.0), r"noise_scale must lie in \(0, 1\], got 0.0"),
        (dict(noise_scale=1.5), "got 1.5"),
        (dict(noise_scale=float("nan")), "got nan"),
        (dict(width=72), "multiples of 16 from 64 on, got 72x64"),
        (dict(width=0), "got 0x64"),
        (dict(height=48), "got 64x48"),
        (dict(schedule="euler"), "unknown schedule 'euler'; known: best_of, knot_overlap, rolling_window, sequential"),
        (dict(schedule=""), "unknown schedule ''"),
        (dict(policy_options=3), "policy_options must be"),
        (dict(policy="magic"), "unknown policy 'magic'; known: anchor_forcing"),
        (dict(mode="i2v"), "mode must be 'v2v' or 't2v', got 'i2v'"),
        (dict(latent_frames_per_chunk=0), "between 1 and 3, got 0"),
        (dict(latent_frames_per_chunk=4), "window of 3 latent frames.*raise window_frames"),
        (
            dict(clean_pass=True),
            "schedule 'stream_batch' has no clean_pass to switch on; use one of best_of, sequential",
        ),
        (dict(schedule_options=dict(beam=2)), "schedule 'stream_batch' has no knob 'beam'"),
        (dict(schedule="rolling_window", steps=4), "4 chunks together, 4 latent frames.*window of 3.*lower steps"),
    ],
)
def test_start_refuses(pipe, options, says):
    with pytest.raises(ValueError, match=says):
        pipe.start("pencil", **options)


def test_a_chunk_must_fit_the_window_at_once(pipe):
    """3 sinks + window 1 hold the first chunk of 4 but never a later one of 3: refused at start, not mid-
    stream.
    """
    with pytest.raises(ValueError, match="between 1 and 1, got 3"):
        pipe.start("pencil", cache=CacheConfig(sink_frames=3, window_frames=1), latent_frames_per_chunk=3)
    for sinks, window in [(0, 3), (1, 2), (3, 2)]:
        cache = CacheConfig(sink_frames=sinks, window_frames=window)
        session = pipe.start("pencil", cache=cache, latent_frames_per_chunk=2)
        assert len(stream(session, moving_frames(57))) == 57


def test_text_to_video_needs_a_preset_for_it():
    pipe = random_pipeline(replace(RANDOM_PRESET, text_to_video=False))
    with pytest.raises(ValueError, match="not trained for text-to-video; push frames"):
        pipe.start("pencil", mode="t2v")


def test_what_is_not_given_comes_from_the_preset():
    options = random_pipeline(RELEASED_STEPS).start("pencil").options
    assert (options.steps, options.noise_scale, options.schedule, options.clean_pass) == (
        2,
        0.8,
        "stream_batch",
        False,
    )
    assert (options.width, options.height, options.cache) == (64, 64, RELEASED_STEPS.cache)
    assert (options.seed, options.mode, options.motion_adaptive, options.policy) == (0, "v2v", True, "sink")


def test_other_sizes(pipe):
    """Any multiple of 16 from 64 on, whatever comes in."""
    session = pipe.start("pencil", width=96, height=64)
    assert stream(session, moving_frames(6, height=80, width=160)).shape == (6, 64, 96, 3)


def test_weights_are_frozen_and_fused(pipe):
    modules = pipe.transformer, pipe.vae, pipe.text_encoder
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)
    assert all(block.self_attn._fused is not None for block in pipe.transformer.blocks)


# --- prompts ------------------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_once(pipe, monkeypatch):
    calls, encode = [], pipe.text_encoder.encode
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda p: calls.append(p) or encode(p))
    first = pipe.encode_prompt("a prompt of this test")
    assert pipe.encode_prompt("a prompt of this test") is first and len(calls) == 1


def test_a_mix_is_the_weighted_mean_of_the_tokens(pipe):
    tokens = [pipe.text_encoder.encode([p]) for p in ("red", "blue paint", "old green")]
    expected = pipe.transformer.encode_prompt(0.2 * tokens[0] + 0.3 * tokens[1] + 0.5 * tokens[2])
    mixed = pipe.encode_prompt({"red": 2, "blue paint": 3, "old green": 5})
    for a, b in zip((*mixed.keys, *mixed.values), (*expected.keys, *expected.values), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)
    alone = pipe.encode_prompt({"red": 4.0, "blue paint": 0.0})
    assert_close(alone.keys[0], pipe.encode_prompt("red").keys[0], rtol=0, atol=1e-12)


def test_the_order_of_a_mix_does_not_matter():
    """Bit for bit, also when another session has asked for the same mix in another order before."""
    mix = {"red": 0.1, "blue paint": 0.7, "old green": 0.2}
    a, b = random_pipeline().encode_prompt(mix), random_pipeline().encode_prompt(dict(reversed(mix.items())))
    assert all(torch.equal(x, y) for x, y in zip(a.values, b.values, strict=True))


def test_the_size_of_weights_does_not_matter(pipe, monkeypatch):
    """Beyond float32 on either side, where a share would be nothing over nothing."""
    encode = pipe.text_encoder.encode
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda prompts: encode(prompts).float())
    same, *mixes = (pipe.encode_prompt({"red": w, "blue paint": w}).keys[0] for w in (1, 1e39, 1e-320))
    for mix in mixes:
        assert torch.equal(mix, same)


@pytest.mark.parametrize("mix", [{}, {"a": 0.0}, {"a": 2.0, "b": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_impossible_mixes(pipe, mix):
    with pytest.raises(ValueError, match="weights must be >= 0"):
        pipe.start(mix)


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder of weights, as bundled ones are laid out, for a preset called ``small``."""
    monkeypatch.setitem(config.PRESETS, "small", replace(RANDOM_PRESET, name="small", bundled=True))
    modules = random_modules(RANDOM_PRESET)
    for module, name in zip(modules, ("transformer", "vae", "text_encoder"), strict=True):
        state = {k: v.float().contiguous() for k, v in module.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_from_preset(saved):
    """Loaded ≡ built in memory from the same float32 weights, but for the convolutions' memory layout."""
    pipe = StreamPipeline.from_preset("small", device="cpu", dtype="float32", weights=saved)
    built = StreamPipeline.from_modules(RANDOM_PRESET, *(m.float() for m in random_modules(RANDOM_PRESET)))
    frames = moving_frames(13)
    loaded, expected = (stream(p.start("pencil"), frames).astype(int) for p in (pipe, built))
    assert np.abs(loaded - expected).max() <= 1 and (loaded != expected).mean() < 1e-2
    assert pipe.transformer.dtype == torch.float32 and pipe.device == torch.device("cpu")


def test_bfloat16_stays_close(saved):
    """The same stream within what 8 bits of mantissa give; NaN or a wrong cast would be far off."""
    frames = moving_frames(21)
    wide, narrow = (
        stream(StreamPipeline.from_preset("small", device="cpu", dtype=d, weights=saved).start("pencil"), frames)
        for d in ("float32", "bfloat16")
    )
    assert np.abs(wide.astype(float) - narrow).mean() < 4 < np.abs(wide.astype(float) - frames).mean()


@pytest.mark.parametrize("missing", ["transformer", "vae", "text_encoder"])
def test_missing_weights(saved, missing):
    (saved / f"{missing}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=missing):
        StreamPipeline.from_preset("small", device="cpu", weights=saved)


def test_presets_that_cannot_be_loaded():
    with pytest.raises(ValueError, match="unknown preset 'huge'; known presets: tiny"):
        StreamPipeline.from_preset("huge")
    with pytest.raises(CheckpointError, match="use 'tiny'"):
        StreamPipeline.from_preset("wan-1.3b")
    with pytest.raises(ValueError, match="'tiny' has a VAE of its own; leave out vae='taew2_1.pth'"):
        StreamPipeline.from_preset("tiny", vae="taew2_1.pth")


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu") == pick_device("cpu")
    with pytest.raises(ValueError, match="sees no GPU"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        pick_device("gpu")
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(pipeline, "cpu_has_bf16", lambda answer=has_bf16: answer)
        assert pick_dtype("auto", torch.device("cpu")) == expected
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        pick_dtype("int8", torch.device("cpu"))
