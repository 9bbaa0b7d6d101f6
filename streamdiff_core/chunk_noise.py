"""How noisy each chunk of a stream starts, and the timesteps it goes through.

``noise_controller.decide`` is pure; kept here is what a stream remembers for it: last frame, last noise scale and
recent changes. The first timestep follows from the noise scale, the others from the preset's list or evenly
spaced (SPEC §3-4). Putting the noise on and taking it off again is the denoiser's.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from streamdiff_core.config import Preset
from streamdiff_core.flow import TIMESTEPS, select_steps, spaced_steps
from streamdiff_core.noise_controller import decide
from streamdiff_core.stream_options import StreamOptions


class ChunkNoise:
    """Made by ``StreamSession``, one a stream.

    Args:
        preset: rules of the controller, and its timesteps if it lists them.
        noise_scale: before the first chunk.
    """

    def __init__(self, preset: Preset, noise_scale: float) -> None:
        self.noise_scale, self.motion = noise_scale, 0.0
        self._config, self._listed = preset.noise, preset.schedule.timesteps
        self._previous: Tensor | None = None
        self._recent: tuple[float, ...] = ()

    def decide(self, pixels: Tensor, latents: Tensor, options: StreamOptions) -> tuple[float, ...]:
        """Timesteps of the next chunk, falling; its noise scale and motion are attributes from then on.

        Args:
            pixels: the chunk's input [T, 3, H, W] in [-1, 1].
            latents: the same encoded [F, C, h, w].
        """
        seen = latents if self._config.form == "paper" else pixels
        rest = select_steps(self._listed, options.steps)[1:] if self._listed else []
        decision = decide(
            seen,
            self._previous,
            self.noise_scale,
            config=replace(self._config, enabled=options.motion_adaptive),
            initial_noise_scale=options.noise_scale,
            next_timestep=rest[0] if rest else None,
            recent_distances=self._recent,
        )
        self._previous, self._recent = seen[-1].clone(), decision.recent_distances
        self.noise_scale, self.motion = decision.noise_scale, decision.motion
        first = float(decision.first_timestep)
        return tuple([first, *rest] if rest else spaced_steps(first, options.steps))

    def from_pure_noise(self, steps: int) -> tuple[float, ...]:
        """Timesteps of a chunk without input: the preset's own where they begin at 1000."""
        trained_from_noise = bool(self._listed) and self._listed[0] == TIMESTEPS
        return tuple(self._listed[:steps] if trained_from_noise else spaced_steps(TIMESTEPS, steps))

    def forget(self) -> None:
        """Let go of the last frame."""
        self._previous = None
