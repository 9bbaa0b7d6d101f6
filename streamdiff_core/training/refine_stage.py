"""Stage 5: the decoder learns to read the transformer's own latents.

A denoiser's latents are not an encoder's: what noise is left differs from token to token and shows as a grid of
16-pixel squares and as flicker. The decoder sees several tokens at once, so it can smooth that away. Half of each
batch is exact latents, so that reconstruction stays what it was; the other half is what the frozen transformer
makes of the source at random noise levels, in one step or two.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.attention import PromptContext
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.training.data import STYLE_NAMES
from streamdiff_core.training.dit_stage import block_causal_mask, draw_noise, prompt_bank
from streamdiff_core.training.runs import Average, Run, learning_rate, set_learning_rate
from streamdiff_core.training.vae_stage import LOG_EVERY_S, PixelBatches, detail_loss, reconstruction_psnr
from streamdiff_core.vae import TinyVAE


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


def train_refinement(
    folder: Path,
    vae: TinyVAE,
    restyler: Restyler,
    clips: Path,
    val_clips: Path,
    *,
    minutes: float,
    peak_lr: float = 6e-4,
    seed: int = 1,
) -> None:
    """Fine-tune ``vae``'s residual decoder into ``folder`` for ``minutes`` in all; resumes."""
    from tqdm import tqdm

    parameters = [*vae.stem.parameters(), *vae.blocks.parameters(), *vae.detail.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    average = Average(vae, decay=0.998)
    run = Run(folder, vae=vae, average=average, optimizer=optimizer)
    batches = PixelBatches(clips, seed)
    budget_s, last_log_s = 60 * minutes, run.seconds
    bar = tqdm(total=round(budget_s), initial=round(run.seconds), unit="s", desc="refine")
    with run, bar:
        while run.seconds < budget_s:
            set_learning_rate(optimizer, learning_rate(peak_lr, run.step, run.seconds / budget_s, 50))
            source, target, styles = batches.draw_pairs(run.step)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
            guess = restyler(vae.encode(source, vae.new_state()), styles, generator)
            exact = vae.encode(target, vae.new_state())
            latents = torch.cat([guess, exact[::2]])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                video = vae.reconstruct(latents, vae.new_state())[:, vae.config.temporal_stride - 1 :].float()
            from_guess = detail_loss(video[: len(guess)], target)
            loss = from_guess + detail_loss(video[len(guess) :], target[::2])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update(vae)
            run.step += 1
            if run.seconds - last_log_s > LOG_EVERY_S or run.seconds >= budget_s:
                shadow = TinyVAE(vae.config)
                shadow.load_state_dict(average.shadow)
                scores = reconstruction_psnr(shadow, val_clips, ("photo", "comic", "neon"))
                run.log({"loss_on_guesses": from_guess.item(), **scores})
                run.save()
                last_log_s = run.seconds
            bar.set_postfix(step=run.step, loss=f"{from_guess.item():.4f}", refresh=False)
            bar.update(round(run.seconds) - bar.n)
