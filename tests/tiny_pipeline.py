"""A pipeline small enough for tests: random modules in the preset's structure, 64x64 pixels."""

from __future__ import annotations

from dataclasses import replace

import torch

from streamdiff_core.config import ModelConfig, Preset, TextConfig, VAEConfig, get_preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.vae import TinyVAE

MODEL = ModelConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_channels=8, out_channels=8,
    text_dim=16, text_len=8, freq_dim=32, prediction="x0",
)  # fmt: skip


def small_preset() -> Preset:
    """The preset ``tiny``, smaller."""
    return replace(
        get_preset("tiny"),
        model=MODEL,
        vae=VAEConfig(latent_channels=8, width=16, num_blocks=1),
        text=TextConfig(dim=16, text_len=8, num_buckets=64, num_heads=2),
        width=64,
        height=64,
    )


def small_pipeline() -> StreamPipeline:
    """Random weights, always the same."""
    preset = small_preset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = CausalWanTransformer(preset.model), TinyVAE(preset.vae), TinyTextEncoder(preset.text)
    return StreamPipeline.from_modules(preset, *modules)
