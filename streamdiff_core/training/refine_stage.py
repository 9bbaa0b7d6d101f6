"""Stage 5: a loss with which ``train_decoder`` learns to read the transformer's own latents.

A denoiser's latents are not an encoder's: what noise is left differs from token to token and shows as a grid of
16-pixel squares and as flicker. The decoder sees several tokens at once, so it can smooth that away; steps across the
edges of tokens that the target does not have count once more in the loss. A third of each
batch is exact latents, so that reconstruction stays what it was; the rest is what the frozen transformer makes of
the source at random noise levels, in one step or two.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.attention import PromptContext
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.training.data import STYLE_NAMES
from streamdiff_core.training.dit_stage import block_causal_mask, draw_noise, prompt_bank
from streamdiff_core.training.vae_stage import PixelBatches, detail_loss, reconstruct
from streamdiff_core.vae import TinyVAE

TOKEN_PX = 16
"""Side of a token of the bundled transformer."""
SEAM_WEIGHT = 0.15


class Restyler:
    """The frozen transformer as a source of imperfect latents."""

    def __init__(self, transformer: CausalWanTransformer, encoder: TinyTextEncoder, seed: int) -> None:
        self.transformer = transformer.to(torch.bfloat16).eval().requires_grad_(False)
        self.bank = prompt_bank(encoder, np.random.default_rng(seed))

    @torch.no_grad()
    def __call__(self, source: Tensor, styles: list[str], generator: torch.Generator) -> Tensor:
        """Source latents [B, F, C, h, w] -> predicted styled latents, every other row in two steps."""
        b, f, _, h, w = source.shape
        index = torch.tensor([STYLE_NAMES.index(style) for style in styles])
        which = torch.randint(0, self.bank.shape[1], (b,), generator=generator)
        prompts = self.transformer.encode_prompt(self.bank[index, which])
        mask = block_causal_mask(f, self.transformer.config.tokens_per_frame(h, w))
        sigma = (0.2 + 0.5 * torch.rand(b, 1, generator=generator)).expand(b, f)
        once = self._step(source, sigma, prompts, mask, generator)
        twice = self._step(once, sigma / 2, prompts, mask, generator)
        return torch.where((torch.arange(b) % 2 == 0)[:, None, None, None, None], once, twice)

    def _step(
        self, z: Tensor, sigma: Tensor, prompts: PromptContext, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        level = sigma[:, :, None, None, None]
        xt = torch.lerp(z, draw_noise(z, generator), level)
        return xt - level * self.transformer(xt, 1000 * sigma, prompts, mask=mask)

    def loss(self, vae: TinyVAE, batches: PixelBatches, step: int, generator: torch.Generator) -> Tensor:
        """Loss of one batch: all crops as the transformer sees them, every other one also as exact latents."""
        source, target, styles = batches.draw_pairs(step)
        guess = self(vae.encode(source, vae.new_state()), styles, generator)
        video = reconstruct(vae, torch.cat([guess, vae.encode(target, vae.new_state())[::2]]))
        exact = detail_loss(video[len(guess) :], target[::2])
        return detail_loss(video[: len(guess)], target) + exact + SEAM_WEIGHT * seam_loss(video[: len(guess)], target)


def seam_loss(video: Tensor, target: Tensor) -> Tensor:
    """Mean square error of the steps across the edges of tokens; pictures begin at an edge."""
    loss = video.new_zeros(())
    for dim in (3, 4):
        edges = torch.arange(TOKEN_PX - 1, video.shape[dim] - 1, TOKEN_PX)
        loss = loss + F.mse_loss(*(x.diff(dim=dim).index_select(dim, edges) for x in (video, target)))
    return loss
