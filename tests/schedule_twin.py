"""Chunks of a clip and single forwards on any cache: slow twins of schedules and input rules are written with them."""

from __future__ import annotations

from copy import deepcopy

from streamdiff_core.flow import add_noise
from streamdiff_core.schedules.steps import NoiseSource
from streamdiff_core.types import RowOp


class Twin:
    """The chunks of a clip, and single forwards on any cache."""

    def __init__(self, pipe, frames, steps):
        self.pipe, self.session = pipe, pipe.start("pencil", steps=steps, schedule="sequential")
        cuts = [0, *range(5, len(frames) + 1, 4)]
        self.chunks = [self.session.encode_chunk(frames[a:b]).chunk for a, b in zip(cuts, cuts[1:], strict=False)]
        self.noise = NoiseSource(0)

    def empty_cache(self):
        return deepcopy(self.session.cache)

    def noised(self, i, step, x0, noise_step=None):
        """Chunk i on its way into a step."""
        chunk = self.chunks[i]
        draw = self.noise(i, step if noise_step is None else noise_step, chunk.latents)
        if step == 0:
            return add_noise(chunk.latents, draw, chunk.noise_scale)
        return add_noise(x0, draw, chunk.timesteps[step] / 1000)

    def forward(self, cache, frame_ids, xt, timesteps, prompt=None):
        """x0 of a row, each latent frame at its own timestep."""
        sigma = tuple(t / 1000 for t in timesteps)
        prompt = self.chunks[0].prompt if prompt is None else prompt
        row = RowOp(
            xt=xt, sigma=sigma, timestep=tuple(timesteps), frame_ids=tuple(frame_ids), cache_row=0, chunk_idx=0,
            step=0, prompt=prompt,
        )  # fmt: skip
        (x0,) = self.pipe.engine.forward([(cache, row)])
        return x0

    def step(self, cache, i, step, x0, timestep=None, noise_step=None):
        """One step of one chunk."""
        chunk = self.chunks[i]
        t = chunk.timesteps[step] if timestep is None else timestep
        return self.forward(cache, chunk.frame_ids, self.noised(i, step, x0, noise_step), [t] * len(chunk.frame_ids))

    def clean(self, cache, i, x0):
        ids = self.chunks[i].frame_ids
        self.forward(cache, ids, x0, [0.0] * len(ids))
