"""Pipelines with untrained weights: a preset's shapes and number types, its real speed, no picture and no download.

``shrink`` divides what makes a full-size preset large (layers, heads, width, VAE channels, picture side), so that the
same benchmark runs end to end on a CPU; its figures then say nothing about the full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from streamdiff_core.config import Preset, get_preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.pipeline import StreamPipeline, cast_vae, pick_device, pick_dtype
from streamdiff_core.taehv import TAEHV
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.vae import TinyVAE
from streamdiff_core.wan_vae import WanVAE

PROMPT_TOKENS = 32
"""Length of a made-up prompt; the rest of the 512 is zero, as padding is."""
VAE_CHANNELS = 96
"""Base width of Wan's VAE."""


class RandomText:
    """``TextEncoder`` that makes up an embedding per prompt, in umT5's shape."""

    def __init__(self, text_len: int, dim: int, device: torch.device) -> None:
        self.shape, self.device = (text_len, dim), device

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, text_len, dim], the same for the same prompt."""
        out = torch.zeros(len(prompts), *self.shape)
        for row, prompt in zip(out, prompts, strict=True):
            numbers = torch.Generator().manual_seed(len(prompt) + sum(prompt.encode()))
            row[:PROMPT_TOKENS].normal_(std=0.1, generator=numbers)
        return out.to(self.device)


def random_pipeline(
    preset: str, device: str = "auto", dtype: str = "auto", seed: int = 0, *, vae: str = "wan", shrink: int = 1
) -> StreamPipeline:
    """Untrained modules in the preset's shapes and number types, made where they run.

    Args:
        preset: any.
        vae: full-size presets: ``wan``, or anything else for a TAEHV.
        shrink: full-size presets: divisor of all sizes.

    Raises:
        ValueError: a shrink below 1, or for the bundled preset.
    """
    config = get_preset(preset)
    if shrink < 1 or (shrink > 1 and config.text is not None):
        raise ValueError(f"shrink {shrink}: must be at least 1, and preset {preset!r} must be a full-size one")
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        if config.text is not None:
            transformer, small, text = (
                CausalWanTransformer(config.model),
                TinyVAE(config.vae),
                TinyTextEncoder(config.text),
            )
            modules = transformer.to(place, number), cast_vae(small, place, number), text.to(place)
        else:
            config = shrunken(config, shrink)
            text = RandomText(config.model.text_len, config.model.text_dim, place)
            big_vae = _filled(_empty_vae(vae, max(8, VAE_CHANNELS // shrink), config), place, number)
            modules = _filled(empty_transformer(config, number), place, number), big_vae, text
        return StreamPipeline.from_modules(config, *modules)


def shrunken(preset: Preset, factor: int) -> Preset:
    """A full-size preset, every size divided; heads keep their width, sides are multiples of 16 and at least 64."""
    m = preset.model
    heads = max(1, m.num_heads // factor)
    model = replace(
        m, num_heads=heads, dim=heads * m.head_dim, ffn_dim=m.ffn_dim // factor,
        num_layers=max(1, m.num_layers // factor),
    )  # fmt: skip
    width, height = (max(64, side // factor // 16 * 16) for side in (preset.width, preset.height))
    return replace(preset, model=model, width=width, height=height)


def _empty_vae(vae: str, channels: int, preset: Preset) -> nn.Module:
    """Wan's VAE or a TAEHV on the meta device."""
    with torch.device("meta"):
        if vae != "wan":
            return TAEHV()
        from diffusers import AutoencoderKLWan

        autoencoder = AutoencoderKLWan(base_dim=channels)
    return WanVAE(autoencoder, raw_latents=preset.source.raw_latents)


def _filled(module: nn.Module, place: torch.device, number: torch.dtype) -> nn.Module:
    """Memory on the device and small random numbers in it; norms keep size 1."""
    constants = {name: x for name, x in module.named_buffers() if not x.is_meta}
    module = module.to(number).to_empty(device=place)
    for name, x in module.named_parameters():
        x.data.fill_(1.0) if x.ndim == 1 and "bias" not in name else x.data.normal_(std=0.02)
    for name, x in module.named_buffers():
        if name in constants:
            x.copy_(constants[name])
    return module
