"""A whole pipeline with random float64 weights, small enough to stream hundreds of frames in a second.

No weight is zero and none is small: what a frame of the past, a prompt or a noise level changes must show
in the output, else a test that compares outputs proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from streamdiff_core.config import (
    CacheConfig,
    ModelConfig,
    NoiseControllerConfig,
    Preset,
    ScheduleConfig,
    TextConfig,
    VAEConfig,
)
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.session import StreamSession
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.types import Fork, ForwardOp
from streamdiff_core.vae import TinyVAE

SIDE = 64
RANDOM_PRESET = Preset(
    name="random",
    summary="Random weights for tests.",
    model=ModelConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=6, out_channels=6,
        text_dim=16, text_len=4, freq_dim=16,
    ),
    vae=VAEConfig(latent_channels=6, width=12, num_blocks=2),
    text=TextConfig(num_buckets=64, dim=16, text_len=4, num_heads=2),
    cache=CacheConfig(sink_frames=1, window_frames=3, positions="packed"),
    noise=NoiseControllerConfig(timestep_offset=0),
    noise_scale=0.6,
    schedule=ScheduleConfig(timesteps=(), use_sigma_table=False, noise="fresh"),
    width=SIDE,
    height=SIDE,
)  # fmt: skip
RELEASED_STEPS = replace(
    RANDOM_PRESET,
    noise=NoiseControllerConfig(),
    noise_scale=0.8,
    schedule=ScheduleConfig(),
    cache=CacheConfig(positions="wrap", refresh_at=9),
)
"""Same model under the released rules: steps 700 500 400 200, sigma table, told 100 less than the noise
added.
"""


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter random; matrices keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            p.data = 1.5 + 0.1 * noise
        elif p.ndim < 2 or "modulation" in name or name == "position":
            p.data = (0.3 * noise) + ("norm" in name and name.endswith("weight"))
        else:
            p.data = 1.2 * noise / p[0].numel() ** 0.5
    return module


def random_modules(preset: Preset, seed: int = 0) -> tuple[CausalWanTransformer, TinyVAE, TinyTextEncoder]:
    """Transformer, VAE and text encoder in float64."""
    transformer = randomise(CausalWanTransformer(preset.model).double(), seed)
    vae = randomise(TinyVAE(preset.vae).double(), seed + 1)
    text = randomise(TinyTextEncoder(preset.text).double(), seed + 2)
    square = torch.randn(vae.basis.shape[::-1], generator=torch.Generator().manual_seed(seed + 3)).double()
    vae.basis.copy_(torch.linalg.qr(square).Q.T)  # orthonormal rows
    vae.scale.fill_(0.4)
    vae.mean.fill_(0.1)
    vae.detail.weight.data *= 0.1
    return transformer, vae, text


def random_pipeline(preset: Preset = RANDOM_PRESET, seed: int = 0) -> StreamPipeline:
    """Same seed, same weights."""
    return StreamPipeline.from_modules(preset, *random_modules(preset, seed))


def moving_frames(num_frames: int, seed: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 [T, H, W, 3]: coarse random blocks that change at an uneven pace, so that motion differs per
    chunk.
    """
    rng = np.random.default_rng(seed)
    a, b = (np.kron(rng.uniform(-1, 1, (height // 8, width // 8, 3)), np.ones((8, 8, 1))) for _ in "ab")
    phases = np.cumsum(0.15 * (1 + np.sin(np.arange(num_frames) / 5.0)))
    video = [127.5 + 60 * (a * np.cos(p) + b * np.sin(p)) for p in phases]
    return np.stack(video).clip(0, 255).astype(np.uint8)


def stream(session: StreamSession, frames: np.ndarray, lengths: Iterable[int] | None = None) -> np.ndarray:
    """Push a clip in pieces of these lengths (default: at once), then flush; all frames that came out."""
    out, start = [], 0
    for length in lengths or [len(frames)]:
        out.append(session.push(frames[start : start + length]))
        start += length
    assert start == len(frames)
    return np.concatenate([*out, session.flush()])


def record_latents(session: StreamSession) -> list[Tensor]:
    """A list that fills with the x0 latents [F, C, h, w] of every chunk that the session decodes."""
    latents, decode = [], session.decode_chunk

    def decode_and_record(denoised):
        assert denoised.chunk_idx == len(latents), "chunks leave once each and in order"
        latents.append(denoised.latents)
        return decode(denoised)

    session.decode_chunk = decode_and_record
    return latents


def drive(schedule, engine, cache, chunk, on_forward=None) -> list:
    """One push into a schedule without a session: runs what it asks for, returns the ``Emit`` events.

    ``on_forward(rows, x0s)`` sees every forward.
    """
    events, reply, emitted = schedule.push(chunk), None, []
    while True:
        try:
            event = events.send(reply)
        except StopIteration:
            return emitted
        reply = None
        if isinstance(event, ForwardOp):
            reply = engine.forward([(cache, row) for row in event.rows])
            if on_forward is not None:
                on_forward(event.rows, reply)
        elif isinstance(event, Fork):
            cache.fork(event.src, event.dst)
        else:
            emitted.append(event)
