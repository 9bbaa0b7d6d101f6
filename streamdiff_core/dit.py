"""Causal Wan diffusion transformer: weights and one forward, no stream state (SPEC §1.5, paper §3).

Parameter names and shapes are those of Wan2.1, so original checkpoints load key by key. Timesteps are per latent
frame. With ``prediction="x0"`` (our bundled model) the network estimates x0 around a per-channel Wiener estimate
and the result is handed out as a velocity, so the sampler does not know the difference: ``x0 = (1 + gate) * Wiener +
std * value``, with a gate and a value per number of a patch. A narrow token cannot carry a patch's noise through the
network; the gate lets it close a channel where nothing moves and open it where something does.

Shapes: B rows, F latent frames, C channels, h x w latent size, P = tokens per frame, L = F * P, D width, n heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.attention import CrossAttention, PromptContext, Rotations, SelfAttention
from streamdiff_core.config import ModelConfig
from streamdiff_core.cpu_kernels import linear_gelu
from streamdiff_core.kernel_block import KernelBlock
from streamdiff_core.kv_cache import CacheView
from streamdiff_core.native_kernels import is_ready
from streamdiff_core.rope import spatial_rotation, temporal_rotation


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoid [..., dim], cosines first, computed in float64 as the reference does (SPEC §1.5-2)."""
    half = dim // 2
    frequency = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.to(torch.float64)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; x [B, F, P, D], shift and scale [B, F, 1, D]."""
    return torch.addcmul(shift, x, 1 + scale)


def level_per_frame(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise level [B, F, 1, 1, 1] of timesteps [B, F], float32 or, for a float64 model, float64."""
    return (timestep / 1000).to(torch.promote_types(torch.float32, dtype))[:, :, None, None, None]


def motion_presence(xt: Tensor, motion: Tensor, sigma: Tensor, margin: float = 1.3) -> Tensor:
    """How sure it is that something moves, [B, F, 1, h, w] in [0, 1]: 0 where the motion channels hold only noise.

    James-Stein shrinkage ``max(0, 1 - margin * sigma² / energy)`` of the motion channels, their energy taken over
    3 x 3 cells. Without motion channels it is 1. ``margin`` is three standard deviations of pure noise's energy.
    """
    energy = (xt.square() * motion).sum(2) / motion.sum().clamp_min(1)  # [B, F, h, w]
    energy = F.avg_pool2d(energy, 3, stride=1, padding=1, count_include_pad=False).unsqueeze(2)
    return (1 - margin * sigma.square() / energy.clamp_min(1e-12)).clamp_min(0)


class Block(nn.Module):
    """One DiT block: modulated self-attention, cross-attention, modulated feed-forward."""

    int8: Callable[..., Tensor] | None = None
    """What computes this block's streams instead, from copies of its weights (``int8_blocks``)."""
    _kernels: KernelBlock | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.register_load_state_dict_post_hook(Block.forget_kernels)
        self.eps = config.eps
        self.self_attn = SelfAttention(dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        layer: int,
        prompt: tuple[Tensor, Tensor],
        rotations: Rotations,
        views: Sequence[CacheView] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """x [B, F, P, D], time [B, F, 6, D] -> [B, F, P, D]."""
        if views is not None and not x.requires_grad and is_ready():
            if self._kernels is None and KernelBlock.fits(self):
                self._kernels = KernelBlock(self, self.int8)
            if self._kernels is not None:
                return self._kernels(x, time, layer, prompt, rotations, views)
        if self.int8 is not None and views is not None:
            return self.int8(x, time, layer, prompt, rotations, views)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(3).unbind(2)
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift1, scale1)
        y = self.self_attn(y.flatten(1, 2), layer, rotations, views, mask).view_as(x)
        x = torch.addcmul(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), *prompt).view_as(x)
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift2, scale2)
        return torch.addcmul(x, self.ffn[2](linear_gelu(y, self.ffn[0])), gate2)

    def forget_kernels(self, *_: object) -> None:
        """The weights have changed: the kernels' view of them is made again when it is needed."""
        self._kernels = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        self.forget_kernels()
        return super()._apply(fn, recurse)


class Head(nn.Module):
    """Final modulated norm and projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        outputs = config.out_channels * (2 if config.prediction == "x0" else 1)  # value, gate
        self.head = nn.Linear(config.dim, outputs * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, P, D], time [B, F, D] -> [B, F, P, patch * C]."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale))


@dataclass(frozen=True, slots=True)
class Tokens:
    """What lies between two blocks: all that one pipeline stage has to hand to the next."""

    x: Tensor
    """[B, F, P, D]."""
    time: Tensor
    """Embedded timestep [B, F, D]; the head modulates with it."""
    time6: Tensor
    """Six modulations per frame [B, F, 6, D], shared by all blocks."""


class CausalWanTransformer(nn.Module):
    """Wan DiT for streams: ``forward`` predicts the velocity of one chunk per row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.prediction == "x0":
            self.register_buffer("latent_std", torch.ones(config.in_channels))
            self.register_buffer("latent_motion", torch.zeros(config.in_channels))  # 1: zero where input is still

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embedding.weight.device

    def fuse(self) -> CausalWanTransformer:
        """Fuse q, k, v of every block for inference; state-dict keys stay the same."""
        for block in self.blocks:
            block.self_attn.fuse()
        return self

    def encode_prompt(self, context: Tensor) -> PromptContext:
        """Prompt tokens [B, text_len, text_dim] -> cross-attention keys and values, once per prompt."""
        embedded = self.embed_prompt(context)
        pairs = [block.cross_attn.project_prompt(embedded) for block in self.blocks]
        return PromptContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def embed_prompt(self, context: Tensor) -> Tensor:
        """Prompt tokens [B, text_len, text_dim] -> [B, text_len, D], from which each layer projects its own."""
        return self.text_embedding(context.to(self.device, self.dtype))

    def forward(
        self,
        xt: Tensor,
        timestep: Tensor,
        prompts: PromptContext | Sequence[PromptContext],
        views: Sequence[CacheView] | None = None,
        *,
        mask: Tensor | None = None,
        frame_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity ``noise - x0``.

        Args:
            xt: noisy latents [B, F, C, h, w].
            timestep: [B, F] in [0, 1000].
            prompts: one context for all rows, or one per row.
            views: one cache view per row, or None to attend within ``xt`` alone (training, tests).
            mask: without views, boolean [L, L] or [B, 1, L, L], True where attention is allowed.
            frame_ids: without views, temporal positions [B, F]; default 0 … F - 1.

        Returns:
            Velocity [B, F, C, h, w], float32 or better.

        Source: SPEC §1.5.
        """
        tokens = self.embed(xt, timestep)
        grid = (xt.shape[-2] // self.config.patch_size[1], xt.shape[-1] // self.config.patch_size[2])
        tokens = self.run_blocks(tokens, grid, prompts, views, mask=mask, frame_ids=frame_ids)
        return self.predict(tokens, xt, timestep)

    def embed(self, xt: Tensor, timestep: Tensor) -> Tokens:
        """First part of ``forward``: latents and timesteps as tokens."""
        (h, w), (_, ph, pw) = xt.shape[-2:], self.config.patch_size
        if h % ph or w % pw:
            raise ValueError(f"latent size {h}x{w} must be a multiple of the patch {ph}x{pw}")
        x = self._patchify(self._scale_input(xt, level_per_frame(timestep, self.dtype)).to(self.dtype))
        time = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim).to(self.dtype))
        return Tokens(x, time, self.time_projection(time).unflatten(-1, (6, -1)))

    def run_blocks(
        self,
        tokens: Tokens,
        grid: tuple[int, int],
        prompts: PromptContext | Sequence[PromptContext],
        views: Sequence[CacheView] | None = None,
        *,
        mask: Tensor | None = None,
        frame_ids: Tensor | None = None,
    ) -> Tokens:
        """Middle part: the blocks this module holds (all of them, or one stage's); ``grid`` is (rows, columns)."""
        rotations = self.rotations(*grid, tokens.x, views, frame_ids)
        x = tokens.x
        for layer, block in enumerate(self.blocks):
            x = block(x, tokens.time6, layer, prompt_rows(prompts, layer), rotations, views, mask)
        return Tokens(x.to(tokens.x.dtype), tokens.time, tokens.time6)

    def predict(self, tokens: Tokens, xt: Tensor, timestep: Tensor) -> Tensor:
        """Last part: tokens -> velocity [B, F, C, h, w], float32 or better; ``xt`` is what ``embed`` was given."""
        (b, f, _, h, w), (_, ph, pw) = xt.shape, self.config.patch_size
        sigma = level_per_frame(timestep, tokens.x.dtype)
        out = self.head(tokens.x, tokens.time).to(sigma.dtype)  # [B, F, P, ph * pw * C]
        out = out.unflatten(2, (h // ph, w // pw)).unflatten(-1, (ph, pw, -1))  # [B, F, y, x, ph, pw, C]
        out = out.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, -1, h, w)
        return out if self.config.prediction == "velocity" else self._velocity(xt.to(sigma.dtype), out, sigma)

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, F, C, h, w] -> [B, F, P, D], tokens in (y, x) order."""
        b, f, c, h, w = x.shape
        _, ph, pw = self.config.patch_size
        x = x.reshape(b, f, c, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 2, 4, 6)  # [B, F, y, x, C, ph, pw]
        return F.linear(x.flatten(4).flatten(2, 3), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _scale_input(self, xt: Tensor, sigma: Tensor) -> Tensor:
        """Unit variance per channel at every noise level (x0 models only; as in EDM's c_in)."""
        if self.config.prediction == "velocity":
            return xt
        variance = ((1 - sigma) * self.latent_std[:, None, None].to(sigma)).square() + sigma.square()
        return xt.to(sigma) * variance.rsqrt()

    def _velocity(self, xt: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """x0 = (1 + gate) * Wiener estimate + std * value, expressed as a velocity; out [B, F, 2 C, h, w]."""
        value, gate = out.chunk(2, dim=2)
        std = self.latent_std[:, None, None].to(sigma)
        wiener = (1 - sigma) * std.square() / (((1 - sigma) * std).square() + sigma.square())
        x0 = (1 + gate) * wiener * xt + std * value
        motion = self.latent_motion[:, None, None].to(sigma)
        x0 = x0 * (1 - motion + motion * motion_presence(xt, motion, sigma))
        return (xt - x0) / sigma.clamp_min(1e-3)

    def rotations(
        self, rows: int, cols: int, x: Tensor, views: Sequence[CacheView] | None, frame_ids: Tensor | None = None
    ) -> Rotations:
        """RoPE multipliers of this forward; keys get their temporal part from the cache when there is one."""
        columns, like = self.config.rope_columns, (x.dtype, x.device)
        b, f = x.shape[:2]
        spatial = spatial_rotation(rows, cols, columns, *like)  # [P, c]
        if views is None:
            ids = torch.arange(f).expand(b, f) if frame_ids is None else frame_ids
            time = [temporal_rotation(tuple(r), columns, *like) for r in ids.tolist()]
        else:
            time = [view.query_rotation(*like) for view in views]
        temporal = torch.stack(time)[:, :, None].expand(b, f, rows * cols, columns[0])
        full = torch.cat([temporal, spatial[None, None, :, columns[0] :].expand(b, f, -1, -1)], dim=-1).flatten(1, 2)
        return Rotations(query=full, key=full if views is None else spatial.repeat(f, 1))


def prompt_rows(prompts: PromptContext | Sequence[PromptContext], layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer: [1, …] when all rows share a prompt, else [B, …]."""
    if isinstance(prompts, PromptContext):
        return prompts.keys[layer], prompts.values[layer]
    if all(p is prompts[0] for p in prompts):
        return prompts[0].keys[layer], prompts[0].values[layer]
    return torch.cat([p.keys[layer] for p in prompts]), torch.cat([p.values[layer] for p in prompts])
