"""A transformer block's stream in fifteen operations: matrix products, and the native kernels between them.

Computes what ``Block.forward`` does, or ``Int8Block`` where 8-bit products are used, with fewer roundings: the residual
stays in float32 within a block and each norm, modulation and rotation is one pass. It holds views of the block's
weights, so the block makes a new one when they change. Hooks on modules inside the block see nothing of it: run what is
to be watched inside ``native_kernels.switched_off()``, with ``quantisation=None``.

Shapes: B rows, F latent frames, P tokens per frame, L = F * P, D width, n heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core import native_kernels as native
from streamdiff_core.attention import Rotations, attend_reads
from streamdiff_core.kv_cache import CacheView
from streamdiff_core.types import Read

if TYPE_CHECKING:
    from streamdiff_core.dit import Block

MAX_PACKED = 1 << 20
"""Numbers of a layer's weight up to which it is laid out anew, once; oneDNN does so in every call, which costs small
layers a fifth of their time and large ones nothing.
"""


class HalfLinear:
    """A bfloat16 layer as ``Int8Linear`` is one: its input needs no rounding."""

    per_step, offset, dtype = 1.0, 0.0, torch.bfloat16

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias, self._packed = weight, bias, None
        if weight.numel() <= MAX_PACKED and len(weight) % native.PANEL == 0:
            self._packed, self._bias = native.pack(weight), bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D']."""
        if self._packed is None:
            return F.linear(x, self._weight, self._bias)
        return native.linear(x, self._packed, self._bias)

    def gelu_for(self, x: Tensor, consumer: HalfLinear) -> Tensor:
        """tanh-GELU of the product, as the next layer reads it."""
        if self._packed is None:
            return F.gelu(self(x), approximate="tanh")
        return native.linear(x, self._packed, self._bias, gelu=True)

    def round(self, x: Tensor) -> Tensor:
        """This layer's input."""
        return x


class KernelBlock:
    """Made by ``Block``; ``int8`` is its ``Int8Block``, if it has one."""

    def __init__(self, block: Block, int8: Any = None) -> None:
        a, c = block.self_attn, block.cross_attn
        self.num_heads, self.eps = a.num_heads, block.eps
        self._norm_q, self._norm_k, self._norm_cross = (m.weight.float() for m in (a.norm_q, a.norm_k, c.norm_q))
        if int8 is not None:
            self._linears, self._base, self._fold = int8.linears, int8.base, int8.fold
            self._norm3, self._handed_on = tuple(reversed(int8.norm3)), torch.float32
            return
        plain = (a.o, c.q, c.o, block.ffn[0], block.ffn[2])
        self._linears = [HalfLinear(w, b) for w, b in (a._fused, *((m.weight, m.bias) for m in plain))]
        self._fold = torch.ones(6, 1)
        self._base = block.modulation.float() + torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])[:, None]  # 1 + scale
        self._norm3 = block.norm3.bias.float(), block.norm3.weight.float()
        self._handed_on = torch.bfloat16  # as pipeline stages do: where they are cut changes nothing

    @staticmethod
    def fits(block: Block) -> bool:
        """Whether the kernels compute this block: prepared for inference, on a CPU, in bfloat16, plain weights."""
        a = block.self_attn
        layers = (a.o, block.cross_attn.q, block.cross_attn.o, block.ffn[0], block.ffn[2])
        return (
            a._fused is not None
            and not block.modulation.requires_grad
            and all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in layers)
            and a.o.weight.dtype == torch.bfloat16
            and a.o.weight.device.type == "cpu"
            and native.fits(a.o.weight.shape[0] // a.num_heads)
            and block.ffn[0].weight.shape[0] % 16 == 0
            and native.is_ready()
        )

    def __call__(
        self,
        x: Tensor,
        time: Tensor,
        layer: int,
        prompt: tuple[Tensor, Tensor],
        rotations: Rotations,
        views: Sequence[CacheView],
    ) -> Tensor:
        """x [B, F, P, D], time [B, F, 6, D] -> [B, F, P, D], bfloat16, or float32 with 8-bit products."""
        qkv, o, cross_q, cross_o, up, down = self._linears
        b, width = len(x), x.shape[-1]
        x = x.float().contiguous()
        changes = torch.addcmul(self._base, time.float(), self._fold)  # shift, scale and gate, twice, [B, F, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = changes.permute(2, 0, 1, 3).flatten(1, 2).contiguous().unbind()
        y = torch.empty(b, x[0].numel() // width, width, dtype=qkv.dtype)  # [B, L, D]; each product has read it before
        native.add_norm(x, None, None, None, (shift1, scale1), y, self.eps)
        q, k, v = qkv(y).split(width, dim=-1)
        q = native.norm_rotate(q, self._norm_q, rotations.query, self.num_heads, self.eps)
        k = native.norm_rotate(k, self._norm_k, rotations.key, self.num_heads, self.eps)
        v = v.to(torch.bfloat16).unflatten(-1, (self.num_heads, -1))
        for i, view in enumerate(views):
            self._attend(q[i], view.read(layer, q[i], k[i], v[i]), y[i], o)
        total = torch.empty_like(x)
        native.add_norm(x, o(y), gate1, total, self._norm3, y, self.eps)
        q = native.norm_rotate(cross_q(y), self._norm_cross, None, self.num_heads, self.eps)
        keys, values = prompt
        groups = [x.flatten(0, 1)[None] if len(keys) == 1 else x for x in (q, y)]  # rows of one prompt are one long row
        for queries, out, k, v in zip(*groups, keys, values, strict=True):
            self._attend(queries, [Read(k, v)], out, cross_o)
        native.add_norm(total, cross_o(y), None, total, (shift2, scale2), y, self.eps)
        native.add_norm(total, down(up.gelu_for(y, down)), gate2, total, None, None, self.eps)
        return total.to(self._handed_on)

    def _attend(self, q: Tensor, reads: list[Read], out: Tensor, consumer: Any) -> None:
        """Queries [L, n, d] and what one row sees -> ``out`` [L, D], as the next layer reads it."""
        if len(reads) == 1 and reads[0].heads is None and reads[0].bias is None:
            keys, values = reads[0].keys, reads[0].values
            native.attend(q, keys, values, out, per_step=consumer.per_step, offset=consumer.offset)
        else:
            out.copy_(consumer.round(attend_reads(q[None], reads))[0])
