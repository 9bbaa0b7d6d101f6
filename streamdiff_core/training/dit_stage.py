"""Stage 2: the causal DiT, trained to turn a noised source latent into the styled latent.

Flow matching with x0-regression that also teaches the SDEdit start of video-to-video:
``xt = (1 - sigma) z + sigma noise`` where z is the *source* latent at the noise levels a stream starts from,
and the styled latent (or the model's own earlier prediction) at the levels of later steps; the target is
always the styled latent. Training begins on small single-frame crops, which are many per second, and ends on
256 px sequences with the block-causal mask and the sink + window positions of the stream.

The learning-rate schedule runs over minutes, not steps: a run can be sized to the time there is; it resumes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.attention import PromptContext
from streamdiff_core.config import ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.training.data import STYLE_NAMES, STYLE_SHARES, LatentClips
from streamdiff_core.training.prompts import DEFAULT_PROMPTS, sample_prompt, training_prompts
from streamdiff_core.training.runs import Average, Run, learning_rate, set_learning_rate
from streamdiff_core.training.vae_basis import is_motion, latent_std
from streamdiff_core.vae import TinyVAE


@dataclass(frozen=True)
class Phase:
    """From ``begin`` (share of the budget) on: rows of ``frames`` latent frames, ``cells`` wide.

    Phases that begin together take turns.
    """

    begin: float
    frames: int
    cells: int
    rows: int


PHASES = (
    Phase(0.0, frames=1, cells=8, rows=64),
    Phase(0.24, frames=1, cells=16, rows=16),
    Phase(0.36, frames=1, cells=16, rows=16),
    Phase(0.36, frames=4, cells=16, rows=4),
    Phase(0.8, frames=4, cells=16, rows=4),
    Phase(0.8, frames=4, cells=32, rows=1),
)
MOTION_WEIGHT = 6.0
SELF_INPUT_FROM = 0.35
LOG_EVERY_S = 120
PROMPTS_PER_STYLE = 160
PROMPTS_PER_BATCH = 16


@torch.no_grad()
def prompt_bank(encoder: TinyTextEncoder, rng: np.random.Generator) -> Tensor:
    """Embedded prompts [styles, PROMPTS_PER_STYLE, text_len, text_dim]."""
    bank = []
    for style in STYLE_NAMES:
        prompts = training_prompts(style)[: PROMPTS_PER_STYLE // 2]
        prompts += [sample_prompt(style, rng) for _ in range(PROMPTS_PER_STYLE - len(prompts))]
        bank.append(encoder.encode(prompts))
    return torch.stack(bank)


def block_causal_mask(frames: int, tokens_per_frame: int) -> Tensor:
    """Boolean [L, L]: a token sees its own and all earlier latent frames."""
    frame = torch.arange(frames).repeat_interleave(tokens_per_frame)
    return frame[:, None] >= frame[None, :]


class Batches:
    """Random training rows: noisy latents, timesteps, prompts, targets."""

    def __init__(self, clips: LatentClips, bank: Tensor, seed: int) -> None:
        self.clips, self.bank, self.seed = clips, bank, seed

    def draw(self, step: int, phase: Phase) -> dict[str, Tensor]:
        """Rows of one step; the same step always gives the same rows."""
        rng = np.random.default_rng([self.seed, step])
        groups = min(phase.rows, PROMPTS_PER_BATCH)
        styles = rng.choice(len(STYLE_NAMES), groups, p=STYLE_SHARES)
        context = self.bank[styles, rng.integers(0, self.bank.shape[1], groups)]
        group = np.repeat(np.arange(groups), phase.rows // groups)
        source, target = self.clips.sample(rng, styles[group], phase.frames, phase.cells)
        if rng.random() < 0.08:  # prompt mixing: halfway embeddings mean halfway pictures
            other = rng.integers(0, len(STYLE_NAMES), groups)
            share = torch.from_numpy(rng.uniform(0.2, 0.8, groups)).float()
            mixed = self.bank[other, rng.integers(0, self.bank.shape[1], groups)]
            context = torch.lerp(context, mixed, share[:, None, None])
            source, target = self._blend(rng, styles, other, share, group, phase)
        return {"source": source, "target": target, "context": context, "group": torch.from_numpy(group)}

    def _blend(
        self,
        rng: np.random.Generator,
        a: np.ndarray,
        b: np.ndarray,
        share: Tensor,
        group: np.ndarray,
        phase: Phase,
    ) -> tuple[Tensor, Tensor]:
        state = rng.bit_generator.state
        source, first = self.clips.sample(rng, a[group], phase.frames, phase.cells)
        rng.bit_generator.state = state  # the same crops again, in the other style
        _, second = self.clips.sample(rng, b[group], phase.frames, phase.cells)
        return source, torch.lerp(first, second, share[torch.from_numpy(group)][:, None, None, None, None])


def draw_noise(target: Tensor, generator: torch.Generator) -> Tensor:
    """Unit noise like ``target`` [B, F, C, h, w]; in half of the rows all frames share it, as in a stream."""
    noise = torch.randn(target.shape, generator=generator)
    fixed = torch.rand(len(target), generator=generator) < 0.5
    return torch.where(fixed[:, None, None, None, None], noise[:, :1], noise)


def random_frame_ids(rows: int, frames: int, generator: torch.Generator) -> Tensor:
    """Temporal positions [B, F]: packed (0, 1, 2 …) in three of four rows, else a sink far behind."""
    ids = torch.arange(frames).repeat(rows, 1)
    if frames > 1:
        gap = torch.randint(0, 200, (rows, 1), generator=generator)
        far = torch.rand(rows, 1, generator=generator) < 0.25
        ids[:, 1:] += gap * far
    return ids


def draw_starts(rows: int, frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Boolean [B, F]: which frames start from the source (first step) rather than from styled latents (later steps).

    Half of the sequences change from styled to source after some frames: a first step whose cache was written by
    last steps, as in sequential sampling and behind the forked first chunk of a stream batch.
    """
    from_source = (torch.rand(rows, 1, generator=generator) < share).repeat(1, frames)
    if frames > 1:
        mixed = torch.rand(rows, 1, generator=generator) < 0.5
        begin = torch.randint(1, frames, (rows, 1), generator=generator)
        from_source = torch.where(mixed, torch.arange(frames) >= begin, from_source)
    return from_source


def draw_sigma(from_source: Tensor, generator: torch.Generator) -> Tensor:
    """Noise level [B, F], one per row and kind with a little jitter: high for source frames, low for styled ones."""
    rows, frames = from_source.shape
    uniform = torch.rand(rows, 2, generator=generator)
    sigma = torch.where(from_source, 0.3 + 0.65 * uniform[:, :1], 0.02 + 0.58 * uniform[:, 1:])
    return (sigma + 0.03 * torch.randn(rows, frames, generator=generator)).clamp(0.02, 0.97)


def select_prompts(context: PromptContext, group: Tensor) -> PromptContext:
    """One prompt per row from one per group."""
    return PromptContext(tuple(k[group] for k in context.keys), tuple(v[group] for v in context.values))


class Objective:
    """Pixel-weighted x0 loss of one batch."""

    def __init__(self, model: CausalWanTransformer, vae: TinyVAE) -> None:
        self.model = model
        # latent error² -> mean pixel error², exact because the basis is orthonormal
        self.pixel_weight = 1 / (vae.scale.square() * vae.basis.shape[1])
        self.detail_weight = (model.latent_std / vae.scale).pow(-0.25)
        self.detail_weight = self.detail_weight / self.detail_weight.mean()
        self.detail_weight = torch.where(is_motion(vae), MOTION_WEIGHT, 1.0) * self.detail_weight

    def predict(self, xt: Tensor, sigma: Tensor, prompts: PromptContext, ids: Tensor, mask: Tensor | None) -> Tensor:
        """x0 prediction, float32."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = self.model(xt, 1000 * sigma, prompts, mask=mask, frame_ids=ids)
        return xt - sigma[:, :, None, None, None] * velocity

    def __call__(self, rows: dict[str, Tensor], generator: torch.Generator, self_input: bool) -> tuple[Tensor, float]:
        """Loss, and the PSNR (dB, pixels) of rows that start from the source; NaN when no row does."""
        source, target = rows["source"], rows["target"]
        b, f, _, h, w = target.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompts = select_prompts(self.model.encode_prompt(rows["context"]), rows["group"])
        tokens = self.model.config.tokens_per_frame(h, w)
        mask = block_causal_mask(f, tokens) if f > 1 else None
        ids = random_frame_ids(b, f, generator)
        from_source = draw_starts(b, f, 0.4 if self_input else 0.6, generator)
        sigma = draw_sigma(from_source, generator)
        styled, noise = target, draw_noise(target, generator)
        if self_input:  # later steps see the model's own earlier prediction
            with torch.no_grad():
                first = (0.4 + 0.5 * torch.rand(b, 1, generator=generator)).expand(b, f)
                xt = torch.lerp(source, noise, first[:, :, None, None, None])
                styled = self.predict(xt, first, prompts, ids, mask)
            second = first * (0.25 + 0.5 * torch.rand(b, 1, generator=generator))
            sigma = torch.where(from_source, sigma, second)
            noise = draw_noise(target, generator)
        z = torch.where(from_source[:, :, None, None, None], source, styled)
        xt = torch.lerp(z, noise, sigma[:, :, None, None, None])
        x0 = self.predict(xt, sigma, prompts, ids, mask)
        error = (x0 - target).square().mean((3, 4))  # [B, F, C]
        weight = 1 / (sigma.square() + 0.1)
        loss = ((error * self.pixel_weight * self.detail_weight).sum(-1) * weight).mean()
        if f > 1:  # errors should not change from one latent frame to the next
            change = (x0 - target).diff(dim=1).square().mean((3, 4))
            loss = loss + 0.5 * ((change * self.pixel_weight).sum(-1) * weight[:, 1:]).mean()
        pixel_mse = (error.detach() * self.pixel_weight).sum(-1)[from_source].mean().item() / 4
        return loss, -10 * math.log10(max(pixel_mse, 1e-9))


@torch.no_grad()
def validate(
    model: CausalWanTransformer,
    vae: TinyVAE,
    clips: LatentClips,
    encoder: TinyTextEncoder,
    noise_scale: float = 0.5,
) -> dict[str, float]:
    """PSNR (dB, latent error expressed in pixels) to every style on whole frames, one and two steps."""
    objective = Objective(model, vae)
    picked = [torch.from_numpy(np.array(c[:, 2:12:6])).float() for c in clips.clips]  # [S, 2, C, h, w] each
    latents = torch.cat(picked, dim=1)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[:, None]
    errors: dict[str, list[float]] = {"psnr_1_step": [], "psnr_2_steps": []}
    for i, style in enumerate(STYLE_NAMES):
        prompts = model.encode_prompt(encoder.encode([DEFAULT_PROMPTS[style]]))
        z = latents[0][:, None]
        for name, sigma in (("psnr_1_step", noise_scale), ("psnr_2_steps", noise_scale / 2)):
            level, ids = torch.full(z.shape[:2], sigma), torch.zeros(z.shape[:2], dtype=torch.long)
            z = objective.predict(torch.lerp(z, noise, sigma), level, prompts, ids, None)
            error = (z[:, 0] - latents[i]).square().mean((2, 3)) * objective.pixel_weight
            errors[name].append(-10 * math.log10(error.sum(-1).mean().item() / 4))
    result = {name: float(np.mean(values)) for name, values in errors.items()}
    return {**result, "worst_style": float(np.min(errors["psnr_2_steps"]))}


def new_model(config: ModelConfig, vae: TinyVAE, clips: LatentClips) -> CausalWanTransformer:
    """An untrained transformer that ignores its prompt at first, and knows the spread of the clips' latents."""
    model = CausalWanTransformer(config)
    for block in model.blocks:
        torch.nn.init.zeros_(block.cross_attn.o.weight)
        torch.nn.init.normal_(block.modulation, std=0.02)
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    samples = torch.cat([torch.from_numpy(np.array(c[:, ::8])).flatten(0, 1) for c in clips.clips[:40]])
    model.latent_std.copy_(latent_std(vae, samples))
    model.latent_motion.copy_(is_motion(vae))
    return model


def train_dit(
    folder: Path,
    config: ModelConfig,
    vae: TinyVAE,
    encoder: TinyTextEncoder,
    train_latents: Path,
    val_latents: Path,
    *,
    minutes: float,
    peak_lr: float = 1.2e-3,
    seed: int = 0,
    compile_model: bool = False,
) -> None:
    """Train into ``folder`` for ``minutes`` in all; resumes from the last checkpoint."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    clips, val = LatentClips(train_latents), LatentClips(val_latents)
    model = new_model(config, vae, clips)
    average = Average(model, decay=0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    run = Run(folder, model=model, average=average, optimizer=optimizer)
    batches = Batches(clips, prompt_bank(encoder, np.random.default_rng(seed)), seed)
    objective = Objective(model, vae)
    if compile_model:
        model.compile(dynamic=False)
    budget_s, last_log_s, smooth = 60 * minutes, run.seconds, math.nan
    bar = tqdm(total=round(budget_s), initial=round(run.seconds), unit="s", desc="dit")
    with run, bar:
        while run.seconds < budget_s:
            progress = run.seconds / budget_s
            latest = max(p.begin for p in PHASES if p.begin <= progress)
            turns = [p for p in PHASES if p.begin == latest]
            phase = turns[run.step % len(turns)]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
            self_input = progress > SELF_INPUT_FROM and run.step % 4 < 2
            set_learning_rate(optimizer, learning_rate(peak_lr, run.step, progress, 100))
            loss, psnr = objective(batches.draw(run.step, phase), generator, self_input)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
            run.step += 1
            if not math.isnan(psnr):
                smooth = psnr if math.isnan(smooth) else 0.98 * smooth + 0.02 * psnr
            if run.seconds - last_log_s > LOG_EVERY_S or run.seconds >= budget_s:
                shadow = CausalWanTransformer(config)
                shadow.load_state_dict(average.shadow)
                run.log({"train_psnr": smooth, **validate(shadow, vae, val, encoder)})
                run.save()
                clips.rescan()
                last_log_s = run.seconds
            bar.set_postfix(step=run.step, psnr=f"{smooth:.2f}", rows=phase.rows, cells=phase.cells, refresh=False)
            bar.update(round(run.seconds) - bar.n)
