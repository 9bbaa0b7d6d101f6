"""The two attentions of a Wan block: causal self-attention over the rolling cache, cross-attention to the prompt.

Weights only: what may be read comes in as a ``CacheView`` per row (SPEC §1.5). Within a chunk attention is
bidirectional; causality is what the cache holds. Prompt keys and values are computed once per prompt
(``PromptContext``), not once per step as upstream does (SPEC §1.5-3).

Shapes: B rows, L = F * P tokens of a chunk, D width, n heads, d head dim, N visible tokens, c complex RoPE columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.cpu_kernels import scaled_dot_product
from streamdiff_core.kv_cache import CacheView
from streamdiff_core.rope import rotate
from streamdiff_core.types import Read


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, computed in float32 or better; float64 stays float64."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class PromptContext:
    """Cross-attention keys and values of one prompt: per layer [1, text_len, n, d]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))


@dataclass(frozen=True)
class Rotations:
    """RoPE multipliers of one forward, shared by all layers."""

    query: Tensor
    """[B, L, c]: temporal and spatial."""
    key: Tensor
    """[L, c] with views (spatial only; the cache adds time), [B, L, c] without."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, scale 1/sqrt(d): q [B, L, n, d], k and v [B or 1, N, n, d] -> [B, L, n * d]."""
    if mask is None and len(k) < len(q):  # all rows look at the same: one long row, and nothing is copied
        return attend(q.flatten(0, 1)[None], k, v).unflatten(1, q.shape[:2]).squeeze(0)
    out = scaled_dot_product(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask)
    return out.transpose(1, 2).flatten(2)


def attend_reads(q: Tensor, reads: Sequence[Read]) -> Tensor:
    """Attention of one row, head group by head group: q [1, L, n, d] -> [1, L, n * d]."""
    if len(reads) == 1 and reads[0].heads is None:
        return attend(q, reads[0].keys[None], reads[0].values[None], _mask(reads[0], q))
    out = torch.empty_like(q)
    for r in reads:
        heads = slice(None) if r.heads is None else list(r.heads)
        group = q[:, :, heads]
        out[:, :, heads] = attend(group, r.keys[None], r.values[None], _mask(r, group)).view_as(group)
    return out.flatten(2)


def _mask(read: Read, q: Tensor) -> Tensor | None:
    """A read's bias as the additive mask [1, n or 1, L or 1, N] of the fused attention."""
    return None if read.bias is None else read.bias.to(q.dtype).expand(1, q.shape[2], q.shape[1], -1)


class SelfAttention(nn.Module):
    """Self-attention with q/k RMSNorm and RoPE; parameter names are Wan's."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self._fused: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_fuse_again)

    def fuse(self) -> None:
        """Lay q, k and v weights side by side, so that one matrix product serves all three (no extra memory)."""
        weight = torch.cat([m.weight.data for m in (self.q, self.k, self.v)])
        bias = torch.cat([m.bias.data for m in (self.q, self.k, self.v)])
        for m, w, b in zip((self.q, self.k, self.v), weight.chunk(3), bias.chunk(3), strict=True):
            m.weight.data, m.bias.data = w, b
        self._fused = weight, bias

    def unfuse(self) -> None:
        """Three products again, each with its own layer, which may then be replaced (quantisation)."""
        self._fused = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfAttention:
        """``.to()`` gives each parameter memory of its own, so lay them side by side again."""
        super()._apply(fn, recurse)
        _fuse_again(self)
        return self

    def __setstate__(self, state: dict) -> None:
        """So do ``copy.deepcopy`` and pickle."""
        super().__setstate__(state)
        _fuse_again(self)

    def forward(
        self,
        x: Tensor,
        layer: int,
        rotations: Rotations,
        views: Sequence[CacheView] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D], reading and writing each row's cache through its view."""
        return self.o(self.read(*self.project(x), layer, rotations, views, mask))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> normalised queries and keys, not rotated yet, and values, each [B, L, n, d]."""
        if self._fused is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = F.linear(x, *self._fused).chunk(3, dim=-1)
        return tuple(t.unflatten(-1, (self.num_heads, -1)) for t in (self.norm_q(q), self.norm_k(k), v))

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        rotations: Rotations,
        views: Sequence[CacheView] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """What ``project`` gave, rotated and written -> what each token read, [B, L, D]."""
        q, k = rotate(q, rotations.query), rotate(k, rotations.key)
        if views is None:
            return attend(q, k, v, mask)
        rows = []
        for row, view in enumerate(views):
            rows.append(attend_reads(q[row : row + 1], view.read(layer, q[row], k[row], v[row])))
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def _fuse_again(module: SelfAttention, _keys: object = None) -> None:
    """Renew the joint tensor after q, k and v got new memory; else the old weights would stay in use."""
    if module._fused is not None:
        module.fuse()


class CrossAttention(nn.Module):
    """Attention to the prompt: no RoPE, no mask, all ``text_len`` positions (SPEC §1.5-6)."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def project_prompt(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompt [B, text_len, D] -> keys and values [B, text_len, n, d]."""
        k, v = self.norm_k(self.k(context)), self.v(context)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, D] with prompt keys and values [B or 1, text_len, n, d] -> [B, L, D]."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        return self.o(attend(q, k, v))
