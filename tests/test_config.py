"""config.py: the numbers of the presets, derived numbers by hand, and what the errors say."""

import dataclasses
import subprocess
import sys

import pytest

from streamdiff_core.config import (
    PRESETS,
    CacheConfig,
    ModelConfig,
    VAEConfig,
    get_preset,
    list_presets,
)


def test_presets_are_listed_in_order_under_their_own_names():
    assert list_presets() == [
        "tiny", "wan-1.3b", "wan-14b", "causvid-1.3b", "self-forcing-1.3b", "causal-forcing-1.3b"
    ]  # fmt: skip
    assert all(get_preset(name).name == name for name in list_presets())


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'Tiny'; known presets: tiny, wan-1.3b, wan-14b"):
        get_preset("Tiny")  # exact names only


def test_wan_shapes_are_the_published_ones():
    # SPEC §1.1: 1536 = 12 x 128, 5120 = 40 x 128; RoPE columns 22 + 21 + 21 = 64 = 128 / 2 (SPEC §1.6)
    for name, dim, ffn_dim, heads, layers in [
        ("wan-1.3b", 1536, 8960, 12, 30),
        ("wan-14b", 5120, 13824, 40, 40),
    ]:
        model = get_preset(name).model
        assert (model.dim, model.ffn_dim, model.num_heads, model.num_layers) == (dim, ffn_dim, heads, layers)
        assert (model.in_channels, model.text_dim, model.text_len, model.freq_dim) == (16, 4096, 512, 256)
        assert model.head_dim == 128
        assert model.rope_columns == (22, 21, 21)
        assert model.tokens_per_frame(60, 104) == 1560  # 480 x 832 pixels: 30 x 52 tokens


def test_released_stream_settings():
    preset = get_preset("wan-1.3b")
    cache = preset.cache
    assert (cache.sink_frames, cache.window_frames, cache.cache_frames, cache.refresh_at) == (3, 3, 6, 50)
    assert (cache.positions, cache.adaptive_sink, cache.adaptive_threshold) == ("wrap", "released", 0.2)
    assert preset.schedule.timesteps == (700.0, 500.0, 400.0, 200.0)
    assert (preset.schedule.shift, preset.schedule.default_steps) == (8.0, 2)
    assert get_preset("wan-14b").schedule.default_steps == 1
    assert (preset.noise_scale, preset.noise.timestep_offset, preset.noise.smoothing) == (0.8, 100, 0.9)


@pytest.mark.parametrize("name", list_presets())
def test_parts_of_a_preset_fit_together(name):
    preset = PRESETS[name]
    assert preset.model.in_channels == preset.model.out_channels == preset.vae.latent_channels
    assert sum(preset.model.rope_columns) == preset.model.head_dim // 2
    cell = preset.vae.spatial_stride * preset.model.patch_size[1]
    assert preset.width % cell == 0 and preset.height % cell == 0
    if preset.text is not None:
        assert (preset.text.dim, preset.text.text_len) == (preset.model.text_dim, preset.model.text_len)
        assert preset.text.dim % preset.text.num_heads == 0


def test_only_tiny_is_bundled_and_it_does_not_claim_text_to_video():
    assert [n for n in PRESETS if PRESETS[n].bundled] == ["tiny"]
    assert not PRESETS["tiny"].text_to_video and PRESETS["wan-1.3b"].text_to_video


@pytest.mark.parametrize("dim, columns", [(12, (2, 2, 2)), (16, (4, 2, 2)), (20, (4, 3, 3)), (128, (22, 21, 21))])
def test_time_takes_the_rope_columns_that_do_not_divide_by_three(dim, columns):
    assert ModelConfig(dim=dim, ffn_dim=8, num_heads=1, num_layers=1).rope_columns == columns


@pytest.mark.parametrize("dim, heads", [(30, 4), (20, 4), (6, 2)])  # not divisible; odd heads of 5 and of 3
def test_heads_must_divide_the_width_evenly(dim, heads):
    with pytest.raises(ValueError, match=f"dim {dim} must be an even multiple of num_heads {heads}"):
        ModelConfig(dim=dim, ffn_dim=8, num_heads=heads, num_layers=1)


def test_a_token_belongs_to_one_frame():
    with pytest.raises(ValueError, match=r"patch_size \(2, 2, 2\): .*start with 1"):
        ModelConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1, patch_size=(2, 2, 2))


@pytest.mark.parametrize("sink, window", [(-1, 3), (3, 0)])
def test_cache_sizes(sink, window):
    with pytest.raises(ValueError, match=f"sink_frames {sink} must be >= 0 and window_frames {window} >= 1"):
        CacheConfig(sink_frames=sink, window_frames=window)


def test_wrap_must_have_somewhere_to_jump_back_to():
    with pytest.raises(ValueError, match="refresh_at 5 must exceed cache_frames - 1 = 5"):
        CacheConfig(positions="wrap", refresh_at=5)
    CacheConfig(positions="wrap", refresh_at=6)
    CacheConfig(positions="absolute", refresh_at=5)  # not used there


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VAEConfig().width = 3
    with pytest.raises(TypeError):
        CacheConfig(3, 3)


def test_listing_presets_needs_no_torch():
    code = "import sys, streamdiff_core.config as c; c.list_presets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
