"""From a chunk's latents to its frames: decoded, seams smoothed, edges taken from the input, held still where it is.

Kept here is what a stream remembers for it: the decoder's memory, the input of the chunks in flight, the pictures
shown last, and chunks whose frames are still on their way from a GPU (``device_streams``).

Shapes: T frames, H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.config import Preset, SteadyConfig
from streamdiff_core.deblock import deblock_
from streamdiff_core.device_streams import InTurn
from streamdiff_core.frames import tensor_to_uint8
from streamdiff_core.guided_filter import share_at
from streamdiff_core.steady import SteadyState, hold_still
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.timing import StageTimer
from streamdiff_core.types import DecodedChunk, DenoisedChunk, StreamingVAE
from streamdiff_core.wiener import wiener


class ChunkDecoder:
    """Made by ``StreamSession``, one a stream; chunks come in order."""

    def __init__(self, vae: StreamingVAE, preset: Preset, streams: InTurn, timer: StageTimer) -> None:
        self._vae, self._preset, self._streams, self._timer = vae, preset, streams, timer
        self._vae_state = vae.new_state()
        self._steady_state = SteadyState()
        self._sources: dict[int, Tensor] = {}  # chunk -> its input [T, 3, H, W]
        self._under_way: deque[tuple[int, Callable[[], np.ndarray]]] = deque()  # chunk, what waits for its frames

    def remember(self, chunk_idx: int, pixels: Tensor, options: StreamOptions) -> None:
        """The input of a chunk that goes into the model, [T, 3, H, W] in [-1, 1], for when it comes out."""
        if options.steady or options.guided:
            self._sources[chunk_idx] = pixels

    def decode(self, denoised: DenoisedChunk, options: StreamOptions) -> DecodedChunk:
        """Latents of one chunk -> uint8 frames [T, H, W, 3], padding removed."""
        return DecodedChunk(denoised.chunk_idx, self._start(denoised, options)())

    def start(self, denoised: DenoisedChunk, options: StreamOptions) -> None:
        """As ``decode``, but ``finished`` has the frames."""
        self._under_way.append((denoised.chunk_idx, self._start(denoised, options)))

    def finished(self, but: int = 0) -> Iterator[DecodedChunk]:
        """All chunks under way but the newest few; a stream's first chunk is always waited for."""
        while len(self._under_way) > but or (self._under_way and self._under_way[0][0] == 0):
            chunk_idx, frames = self._under_way.popleft()
            yield DecodedChunk(chunk_idx, frames())

    @property
    def nbytes(self) -> int:
        """Bytes remembered."""
        states = (self._vae_state, self._steady_state, *self._sources.values())
        return sum(state.nbytes for state in states)

    def pixels(self, denoised: DenoisedChunk) -> Tensor:
        """As the VAE decodes them, [T, 3, H, W] in [-1, 1]."""
        return self._vae.decode(denoised.latents[None], self._vae_state)[0]

    @torch.inference_mode()
    def _start(self, denoised: DenoisedChunk, options: StreamOptions) -> Callable[[], np.ndarray]:
        """What waits for the frames."""
        source = self._sources.pop(denoised.chunk_idx, None)
        with self._streams.stage("decode", denoised.latents, *([] if source is None else [source])):
            with self._timer.stage("decode", denoised.chunk_idx):
                video = self._follow(deblock_(self.pixels(denoised), self._preset.seams), source, options)
            with self._timer.stage("border", denoised.chunk_idx):
                return self._streams.fetch(tensor_to_uint8(video[None])[: denoised.num_frames])

    def _follow(self, video: Tensor, source: Tensor | None, options: StreamOptions) -> Tensor:
        """Decoded frames with the edges of their input, and still where it is still; both [T, 3, H, W]."""
        if options.guided and source is not None:
            share = share_at(options.noise_scale, self._preset.noise_scale)
            video = wiener(video.lerp(self._vae.guide(video, source), share), self._preset.grain_levels).clamp_(-1, 1)
        if source is None or not options.steady:
            self._steady_state = SteadyState()
            return video
        return hold_still(video, source, self._steady_state, self._preset.steady or SteadyConfig())
