"""Untrained pipelines have the shapes of the trained ones and repeat."""

from __future__ import annotations

import pytest
import torch

from streamdiff_core.config import get_preset
from streamdiff_core.random_weights import random_pipeline, shrunken
from streamdiff_core.taehv import TAEHV


def test_bundled_preset_repeats() -> None:
    state = torch.get_rng_state()
    first, second = (random_pipeline("tiny", "cpu", "float32") for _ in range(2))
    torch.testing.assert_close(torch.get_rng_state(), state)
    assert first.preset.name == "tiny"
    for a, b in zip(first.transformer.parameters(), second.transformer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be a full-size one"):
        random_pipeline("tiny", shrink=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        random_pipeline("wan-1.3b", shrink=0)


def test_shrinking_keeps_what_the_kernels_see() -> None:
    """Head width decides which attention kernel runs."""
    small = shrunken(get_preset("wan-14b"), 4)
    assert (small.model.num_heads, small.model.num_layers, small.model.head_dim) == (10, 10, 128)
    assert (small.model.ffn_dim, small.width, small.height) == (3456, 208, 112)
    assert shrunken(get_preset("wan-14b"), 1) == get_preset("wan-14b")


@pytest.mark.parametrize("vae", ["wan", "taehv"])
def test_full_size_preset(vae: str) -> None:
    """Finite pictures that move: a constant or NaN stream would still have a speed."""
    pytest.importorskip("diffusers")
    pipe = random_pipeline("wan-1.3b", "cpu", "float32", vae=vae, shrink=12)
    assert isinstance(pipe.vae, TAEHV) == (vae == "taehv")
    first, second, other = pipe.text_encoder.encode(["oil", "oil", "ink"])
    assert torch.equal(first, second) and not torch.equal(first, other) and first.shape == (512, 4096)
    assert not first[40:].any()
    latents = torch.randn(1, 1, 16, 8, 8)
    out = pipe.vae.decode(latents, pipe.vae.new_state())
    assert torch.isfinite(out).all()
    if vae == "wan":
        mean = torch.tensor(pipe.vae.autoencoder.config.latents_mean)
        torch.testing.assert_close(pipe.vae.latents_mean.flatten(), mean)
