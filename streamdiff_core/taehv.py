"""TAEHV, the tiny autoencoder for Wan's latents, as a streaming VAE with true memory (SPEC §5.3).

Its only memory is one frame per ``MemBlock``: the block's input one step earlier, zeros at the start. A stream carries
those frames from call to call (``TAEHVState``), so streamed equals whole, at the cost of the new frames alone. Upstream
decodes the last three latents again from zero memory on each call: not exact, four times the work, one frame short.

Layer numbers are those of the published weights (``taew2_1``), so the files load key by key. It reads normalised
latents as they come out of the transformer. The first frame stands alone, as in Wan: encoded as four copies of itself,
decoded to four frames of which the last is kept.

Shapes: B streams, T frames at a block's rate, C channels, H x W pixels, h x w = H/8 x W/8.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 4
"""Pixel frames per latent frame after the first."""


@dataclass(slots=True)
class TAEHVState:
    """Memory of one stream: the last input [B, C, h, w] of each memory block, by the block's number."""

    encoder: dict[int, Tensor] = field(default_factory=dict)
    decoder: dict[int, Tensor] = field(default_factory=dict)
    encoded_first: bool = False
    decoded_first: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in (*self.encoder.values(), *self.decoder.values()))


class MemBlock(nn.Module):
    """Residual block of a frame and the frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x and before: [B * T, C, h, w]."""
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class TimePool(nn.Module):
    """``stride`` frames -> 1."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B * T * stride, C, h, w] -> [B * T, C, h, w]."""
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class TimeGrow(nn.Module):
    """1 frame -> ``stride``."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B * T, C, h, w] -> [B * T * stride, C, h, w]."""
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class SoftClamp(nn.Module):
    """Keeps latents within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


class TAEHV(nn.Module):
    """``StreamingVAE`` with the layers of ``taew2_1``: 1.47 M parameters to encode, 9.84 M to decode."""

    def __init__(self, latent_channels: int = 16, widths: tuple[int, int, int, int] = (256, 128, 64, 64)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.encoder = nn.Sequential(
            _conv(3, d), nn.ReLU(),
            TimePool(d, 2), _conv(d, d, stride=2, bias=False), *(MemBlock(d) for _ in range(3)),
            TimePool(d, 2), _conv(d, d, stride=2, bias=False), *(MemBlock(d) for _ in range(3)),
            TimePool(d, 1), _conv(d, d, stride=2, bias=False), *(MemBlock(d) for _ in range(3)),
            _conv(d, latent_channels),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            SoftClamp(), _conv(latent_channels, a), nn.ReLU(),
            *(MemBlock(a) for _ in range(3)), nn.Upsample(scale_factor=2), TimeGrow(a, 1), _conv(a, b, bias=False),
            *(MemBlock(b) for _ in range(3)), nn.Upsample(scale_factor=2), TimeGrow(b, 2), _conv(b, c, bias=False),
            *(MemBlock(c) for _ in range(3)), nn.Upsample(scale_factor=2), TimeGrow(c, 2), _conv(c, d, bias=False),
            nn.ReLU(), _conv(d, 3),
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.encoder[0].weight.dtype

    def new_state(self) -> TAEHVState:
        """Fresh memory for one stream."""
        return TAEHVState()

    def encode(self, frames: Tensor, state: TAEHVState) -> Tensor:
        """Encode the next frames [B, T, 3, H, W] in [-1, 1] of a stream to normalised latents [B, F, C, h, w].

        Raises:
            ValueError: not 1 + 4n frames on the first call or 4n later.
        """
        lead = 0 if state.encoded_first else 1
        if frames.shape[1] < lead or (frames.shape[1] - lead) % GROUP:
            want = "4n frames after the first call" if state.encoded_first else "1 + 4n frames first"
            raise ValueError(f"{frames.shape[1]} frames do not make whole latent frames; pass {want}")
        if lead:
            frames = torch.cat([frames[:, :1].expand(-1, GROUP - 1, -1, -1, -1), frames], 1)
            state.encoded_first = True
        latents = _run(self.encoder, (frames.to(self.dtype) + 1) / 2, state.encoder)
        return latents.to(torch.promote_types(self.dtype, torch.float32))

    def decode(self, latents: Tensor, state: TAEHVState) -> Tensor:
        """Decode the next normalised latents [B, F, C, h, w] of a stream to [B, T, 3, H, W] in [-1, 1]."""
        frames = _run(self.decoder, latents.to(self.dtype), state.decoder).clamp(0, 1) * 2 - 1
        if not state.decoded_first:
            state.decoded_first = True
            frames = frames[:, GROUP - 1 :]
        return frames


def published_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published decoder also grows time in its first stage; like its authors we keep the last of the two frames."""
    key = "decoder.7.conv.weight"
    width = state[key].shape[1]
    return {**state, key: state[key][-width:]}


def _conv(width_in: int, width_out: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, **options)


def _run(layers: nn.Sequential, x: Tensor, memory: dict[int, Tensor]) -> Tensor:
    """All layers over [B, T, C, H, W]; each memory block reads and leaves its last input in ``memory``."""
    streams, x = len(x), x.flatten(0, 1)
    for i, layer in enumerate(layers):
        if isinstance(layer, MemBlock):
            frames = x.unflatten(0, (streams, -1))
            before = torch.cat([memory.get(i, torch.zeros_like(frames[:, 0]))[:, None], frames[:, :-1]], 1)
            memory[i] = frames[:, -1].clone()
            x = layer(x, before.flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (streams, -1))
