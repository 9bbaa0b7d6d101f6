"""A pipeline that hands its input through: real sessions, schedule, cache, engine, and a model that changes nothing.

What the browser tests ask about (order, owner, lag, queues) must not depend on how a model paints. The VAE only moves
pixels into channels; the transformer predicts velocity 0, so x0 = xt, the input with as much noise as was put on it.
``seconds_per_forward`` makes it slow, ``faults`` makes it fail where a prompt says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core import StreamPipeline, get_preset
from streamdiff_core.config import ModelConfig, TextConfig, VAEConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.text import TinyTextEncoder

STRIDE, GROUP = 8, 4
CHANNELS = 3 * GROUP * STRIDE * STRIDE
FAULTS = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "broken chunk": lambda: RuntimeError("a row of this stream failed"),
    "worker crash": lambda: SystemExit("the worker is gone"),
}
"""Prompt that provokes it -> what the transformer raises then."""


@dataclass(slots=True)
class FirstFrame:
    """Whether the first frame has passed, each way."""

    encoded: bool = False
    decoded: bool = False
    nbytes: int = 0


class PixelVAE(nn.Module):
    """1 + 4n frames <-> 1 + n latent frames without loss; the first frame is repeated four times."""

    def new_state(self) -> FirstFrame:
        return FirstFrame()

    def encode(self, frames: Tensor, state: FirstFrame) -> Tensor:
        """[B, T, 3, H, W] -> [B, F, 768, H/8, W/8]."""
        if not state.encoded:
            frames = torch.cat([frames[:, :1].expand(-1, GROUP - 1, -1, -1, -1), frames], 1)
            state.encoded = True
        groups = frames.unflatten(1, (-1, GROUP)).flatten(2, 3)  # [B, F, 12, H, W]
        return F.pixel_unshuffle(groups, STRIDE)

    def decode(self, latents: Tensor, state: FirstFrame) -> Tensor:
        """The way back."""
        frames = F.pixel_shuffle(latents, STRIDE).unflatten(2, (GROUP, 3)).flatten(1, 2)
        if not state.decoded:
            state.decoded = True
            frames = frames[:, GROUP - 1 :]
        return frames


class PassThrough(CausalWanTransformer):
    """Velocity 0, after a while; fails once when the prompt asks for it."""

    seconds_per_forward = 0.0
    faults: dict[int, str] = {}

    def encode_prompt(self, context: Tensor):
        prompt = super().encode_prompt(context)
        fault = next((name for name, key in self.fault_keys.items() if torch.equal(key, context)), None)
        if fault:
            self.faults[id(prompt)] = fault
        return prompt

    def forward(self, xt, timestep, prompts, views=None, **_):
        time.sleep(self.seconds_per_forward)
        for prompt in prompts if isinstance(prompts, (list, tuple)) else [prompts]:
            if id(prompt) in self.faults:
                raise FAULTS[self.faults.pop(id(prompt))]()  # once: the next chunk goes through
        return torch.zeros_like(xt)


def transparent_pipeline(seconds_per_forward: float = 0.0) -> StreamPipeline:
    """256 x 256, one step, 1 % noise."""
    tiny = get_preset("tiny")
    preset = replace(
        tiny,
        model=ModelConfig(dim=16, ffn_dim=16, num_heads=1, num_layers=1, in_channels=CHANNELS, out_channels=CHANNELS,
                          text_dim=16, text_len=16, freq_dim=16),
        vae=VAEConfig(latent_channels=CHANNELS),
        text=TextConfig(num_buckets=512, dim=16, text_len=16, num_heads=2),
        noise_scale=0.01,
        schedule=replace(tiny.schedule, default_steps=1),
    )  # fmt: skip
    torch.manual_seed(0)
    transformer, text = PassThrough(preset.model), TinyTextEncoder(preset.text)
    transformer.seconds_per_forward = seconds_per_forward
    pipe = StreamPipeline.from_modules(preset, transformer, PixelVAE(), text)
    transformer.fault_keys = {name: text.encode([name]) for name in FAULTS}
    return pipe
