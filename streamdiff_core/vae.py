"""The bundled streaming VAE: 1 + 4n pixel frames <-> 1 + n latent frames, with one frame of causal memory.

The encoder is one orthonormal linear map: a patch of 4 x 8 x 8 x 3 numbers onto its leading principal components,
whitened and scaled so that noise destroys the fine components first. The decoder is the transposed map plus
causal residual blocks at latent resolution, which remove blocking and restore detail (Stream-VAE, paper §3.4;
SPEC §5.2). Like Wan's VAE the first frame stands alone: it is encoded as four copies of itself.

Weights only. Each stream owns a ``VAEState``; whole clip ≡ any split of it, because a latent frame depends on its
own four frames and a decoded chunk on its own and the previous latent frame's features.

Shapes: B streams, T pixel frames, F latent frames, C latent channels, H x W pixels, h x w = H/8 x W/8, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.config import VAEConfig
from streamdiff_core.guided_filter import GuidedFilter

STILL_ENERGY = 0.04
"""Energy of an 8 x 8 x 4 patch's changing part (one grey level RMS) at which the decoder's detail half moves."""


@dataclass(slots=True)
class VAEState:
    """Memory of one stream: what the causal blocks saw last, and whether the first frame has passed."""

    encoded_first: bool = False
    decoded_first: bool = False
    features: list[Tensor | None] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in self.features if x is not None)


class CausalBlock(nn.Module):
    """Residual block that sees its own latent frame and the one before; the output starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.now = nn.Conv2d(width, width, 3, padding=1)
        self.before = nn.Conv2d(width, width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.before.weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [B * F, D, h, w]; memory: the same features one latent frame earlier."""
        return x + self.out(F.silu(self.now(F.silu(x)) + self.before(F.silu(memory))))


class TinyVAE(nn.Module):
    """PCA encoder, PCA + residual causal decoder. ``StreamingVAE`` protocol."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        t, s, c = config.temporal_stride, config.spatial_stride, config.latent_channels
        self.register_buffer("basis", torch.eye(3 * t * s * s)[:c].clone())  # [C, 3 * t * s * s], orthonormal rows
        self.register_buffer("mean", torch.zeros(3 * t * s * s))
        self.register_buffer("scale", torch.ones(c))  # latent = scale * component
        self.stem = nn.Conv2d(c, config.width, 1)
        self.blocks = nn.ModuleList(CausalBlock(config.width) for _ in range(config.num_blocks))
        self.detail = nn.Conv2d(config.width, 3 * t * s * s, 1)
        nn.init.zeros_(self.detail.weight)
        nn.init.zeros_(self.detail.bias)
        self.guide = GuidedFilter(config.guide_width) if config.guide_width else None

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.stem.weight.dtype

    def new_state(self) -> VAEState:
        """Fresh memory for one stream."""
        return VAEState(features=[None] * len(self.blocks))

    def encode(self, frames: Tensor, state: VAEState) -> Tensor:
        """Encode the next frames of a stream.

        Args:
            frames: [B, T, 3, H, W] in [-1, 1]; T = 1 + 4n on the first call, 4n later; H and W multiples of 8.
            state: the stream's memory.

        Returns:
            Latents [B, F, C, h, w], float32 or better.

        Raises:
            ValueError: a number of frames or a size that does not fit.
        """
        stride = self.config.temporal_stride
        self._check_frames(frames, state)
        if not state.encoded_first:
            state.encoded_first = True
            first = frames[:, :1].expand(-1, stride, -1, -1, -1)
            frames = torch.cat([first, frames[:, 1:]], dim=1)
        basis = self.basis * self.scale[:, None]
        offset = basis @ self.mean
        return torch.einsum("bfyxn,cn->bfcyx", self._to_patches(frames.to(basis)), basis) - offset[:, None, None]

    def decode(self, latents: Tensor, state: VAEState) -> Tensor:
        """Decode the next latent frames [B, F, C, h, w] of a stream to [B, T, 3, H, W] in [-1, 1]."""
        video = self.reconstruct(latents, state).clamp_(-1, 1)
        if not state.decoded_first:
            state.decoded_first = True
            video = video[:, self.config.temporal_stride - 1 :]
        return video

    def reconstruct(self, latents: Tensor, state: VAEState) -> Tensor:
        """All 4 F frames of F latent frames, not clamped: the differentiable part of ``decode``."""
        b, f = latents.shape[:2]
        x = self.stem(latents.flatten(0, 1).to(self.dtype, memory_format=torch.channels_last))
        for i, block in enumerate(self.blocks):
            x = block(x, self._shift(x, b, i, state))
        detail = self.detail(x).permute(0, 2, 3, 1).unflatten(0, (b, f))  # [B, F, y, x, N]
        cells = latents.permute(0, 1, 3, 4, 2)  # [B, F, y, x, C]
        linear = torch.addmm(self.mean, cells.flatten(0, 3), self.basis / self.scale[:, None])
        video = linear.view(*cells.shape[:4], -1).add_(self._calm(detail, latents))
        return self._from_patches(video)

    def _calm(self, detail: Tensor, latents: Tensor) -> Tensor:
        """Detail [B, F, y, x, 3 * t * s * s] that changes within a latent frame only where the latents say so."""
        t = self.config.temporal_stride
        still_share = self.basis.unflatten(1, (3, t, -1)).mean(2).square().sum((1, 2)) * t  # [C]
        moving = ((still_share < 0.5) / self.scale).to(latents)[:, None, None]
        energy = F.avg_pool2d((latents * moving).square().sum(2), 3, stride=1, padding=1)  # [B, F, y, x]
        presence = (energy / (energy + STILL_ENERGY)).to(detail.dtype)[..., None, None, None]
        frames = detail.unflatten(-1, (3, t, -1))
        return torch.lerp(frames.mean(-2, keepdim=True).expand_as(frames), frames, presence).flatten(4)

    def _shift(self, x: Tensor, b: int, i: int, state: VAEState) -> Tensor:
        """Features one latent frame earlier; a stream starts with its own first frame. Keeps the last in ``state``."""
        frames = x.unflatten(0, (b, -1))
        before = frames[:, :1] if state.features[i] is None else state.features[i]
        state.features[i] = frames[:, -1:].clone()
        return torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1)

    def _check_frames(self, frames: Tensor, state: VAEState) -> None:
        t, (h, w), stride = frames.shape[1], frames.shape[-2:], self.config.spatial_stride
        if h % stride or w % stride:
            raise ValueError(f"frame size {h}x{w} must be a multiple of {stride}")
        lead = 0 if state.encoded_first else 1
        if t < lead or (t - lead) % self.config.temporal_stride:
            want = "1 + 4n frames first" if lead else "4n frames after the first call"
            raise ValueError(f"{t} frames do not make whole latent frames; pass {want}")

    def _to_patches(self, frames: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, F, y, x, 3 * t * s * s] (channel, time, row, column)."""
        t, s = self.config.temporal_stride, self.config.spatial_stride
        x = frames.unflatten(1, (-1, t)).unflatten(-1, (-1, s)).unflatten(-3, (-1, s))  # [B, F, t, 3, y, s, x, s]
        return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4)

    def _from_patches(self, patches: Tensor) -> Tensor:
        """Inverse of ``_to_patches``."""
        t, s = self.config.temporal_stride, self.config.spatial_stride
        x = patches.unflatten(-1, (3, t, s, s)).permute(0, 1, 5, 4, 2, 6, 3, 7)  # [B, F, t, 3, y, s, x, s]
        return x.flatten(6, 7).flatten(4, 5).flatten(1, 2)
