"""Stage 3: the residual decoder of the tiny VAE, on top of the closed-form basis.

The encoder stays the linear map, so the decoder can be trained while the transformer is. It learns to undo
blocking and restore detail from exact latents and from latents with a little noise, which is what a denoiser
hands over. Its residual starts at zero: training begins at the closed-form result and can only improve on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.frames import frames_to_tensor, tensor_to_frames
from streamdiff_core.metrics import psnr
from streamdiff_core.training.data import STYLE_NAMES, STYLE_SHARES, augment, iter_clips, whole_latent_frames
from streamdiff_core.training.runs import Trainee, fit
from streamdiff_core.training.styles import apply_style
from streamdiff_core.vae import TinyVAE

CROP_PX = 96
NUM_FRAMES = 9
CROPS_PER_CLIP = 4
MAX_NOISE = 0.3

LossOf = Callable[[TinyVAE, "PixelBatches", int, torch.Generator], Tensor]


class PixelBatches:
    """Random styled crops of random clips: float32 [B, 9, 3, 96, 96]."""

    def __init__(self, clips: Path, seed: int) -> None:
        self.clips, self.seed = [frames for _, frames in iter_clips(clips)], seed

    def draw(self, step: int, num_clips: int = 2) -> Tensor:
        """Styled crops of one step; the same step always gives the same ones."""
        return self.draw_pairs(step, num_clips)[1]

    def draw_pairs(self, step: int, num_clips: int = 2) -> tuple[Tensor, Tensor, list[str]]:
        """Source crops, the same crops styled, and the style of each."""
        rng = np.random.default_rng([self.seed, step])
        sources, styled, styles = [], [], []
        for _ in range(num_clips):
            frames = self.clips[rng.integers(len(self.clips))]
            at = rng.integers(0, len(frames) - NUM_FRAMES + 1)
            frames = frames[at : at + NUM_FRAMES]
            if rng.random() < 0.5:
                frames = _repeat_to(augment(frames, rng), NUM_FRAMES)
            style = "photo" if rng.random() < 0.2 else STYLE_NAMES[rng.choice(len(STYLE_NAMES), p=STYLE_SHARES)]
            before, after = frames_to_tensor(frames), frames_to_tensor(apply_style(style, frames))
            for _ in range(CROPS_PER_CLIP):
                y, x = 16 * rng.integers(0, (np.array(before.shape[-2:]) - CROP_PX) // 16 + 1)
                cut = (..., slice(y, y + CROP_PX), slice(x, x + CROP_PX))
                sources.append(before[cut])
                styled.append(after[cut])
                styles.append(style)
        return torch.cat(sources), torch.cat(styled), styles


def _repeat_to(frames: np.ndarray, count: int) -> np.ndarray:
    """First ``count`` frames, the last one repeated when there are fewer."""
    return frames[np.minimum(np.arange(count), len(frames) - 1)]


def detail_loss(video: Tensor, target: Tensor, dims: Sequence[int] = (1, 3, 4)) -> Tensor:
    """Mean square error plus the same of temporal and spatial differences (flicker, edges)."""
    loss = F.mse_loss(video, target)
    for dim in dims:
        loss = loss + 0.5 * F.mse_loss(video.diff(dim=dim), target.diff(dim=dim))
    return loss


@torch.no_grad()
def reconstruction_psnr(vae: TinyVAE, clips: Path, styles: tuple[str, ...] = STYLE_NAMES) -> dict[str, float]:
    """PSNR (dB) of encode + decode per style, mean over the clips, on all their frames."""
    scores: dict[str, list[float]] = {style: [] for style in styles}
    for _, frames in iter_clips(clips):
        frames = whole_latent_frames(frames)
        for style in styles:
            styled = apply_style(style, frames)
            latents = vae.encode(frames_to_tensor(styled), vae.new_state())
            scores[style].append(psnr(tensor_to_frames(vae.decode(latents, vae.new_state())), styled))
    return {style: float(np.mean(values)) for style, values in scores.items()}


def exact_loss(vae: TinyVAE, batches: PixelBatches, step: int, generator: torch.Generator) -> Tensor:
    """Loss of one batch of exact latents, some with a little noise."""
    target = batches.draw(step)
    latents = vae.encode(target, vae.new_state())
    amount = MAX_NOISE * torch.rand(len(latents), 1, 1, 1, 1, generator=generator).square()
    latents = latents + amount * torch.randn(latents.shape, generator=generator)
    return detail_loss(reconstruct(vae, latents), target)


def reconstruct(vae: TinyVAE, latents: Tensor) -> Tensor:
    """Differentiable decode of 1 + n latent frames in mixed precision, float32 [B, 1 + 4n, 3, H, W]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vae.reconstruct(latents, vae.new_state())[:, vae.config.temporal_stride - 1 :].float()


def train_decoder(
    folder: Path,
    vae: TinyVAE,
    clips: Path,
    val_clips: Path,
    *,
    minutes: float,
    loss_of: LossOf = exact_loss,
    peak_lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train ``vae``'s residual decoder on ``loss_of`` into ``folder`` for ``minutes`` in all; resumes."""
    parameters = [*vae.stem.parameters(), *vae.blocks.parameters(), *vae.detail.parameters()]
    batches = PixelBatches(clips, seed)

    def score(shadow: dict[str, Tensor]) -> dict[str, float]:
        averaged = TinyVAE(vae.config)
        averaged.load_state_dict(shadow)
        return reconstruction_psnr(averaged, val_clips, ("photo", "comic", "neon"))

    fit(
        Trainee(vae, "vae", parameters), folder, lambda step, generator: loss_of(vae, batches, step, generator), score,
        minutes=minutes, peak_lr=peak_lr, seed=seed,
    )  # fmt: skip
