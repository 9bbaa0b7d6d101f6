"""Transformer blocks with 8-bit products, for a CPU with VNNI instructions, where those are twice as fast as bfloat16.

The six linear layers of a block multiply int8 weights (a scale per output channel) by uint8 activations (one fixed
range per layer, measured once by ``measure_ranges`` and kept beside the weights). Fixed ranges keep the rows of a batch
independent of each other, and sums of integers exact in any order. Between the products numbers are float32; attention
and the cache stay as they are. Text, time, patches and head are left alone. What it costs and saves: ``docs/LOG.md``.

Shapes: B rows, F latent frames, P tokens per frame, L = F * P, D width, n heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.attention import Rotations, attend, attend_reads
from streamdiff_core.dit import Block, CausalWanTransformer
from streamdiff_core.kv_cache import CacheView
from streamdiff_core.rope import rotate
from streamdiff_core.types import CheckpointError

LAYERS = ("self_attn", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
"""Modules of a block whose input is rounded; the first stands for q, k and v."""
RANGES_FILE = "int8_ranges.json"
Range = tuple[float, float]
"""Smallest and largest value; what lies outside is clipped."""


class Int8Linear:
    """A linear layer from uint8 activations."""

    def __init__(self, weight: Tensor, bias: Tensor, span: Range) -> None:
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        self.step = max(high - low, 1e-6) / 255
        self.zero = round(-low / self.step)
        weight = weight.detach().float()
        self._scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._bias = bias.detach().float()

    def round(self, x: Tensor) -> Tensor:
        """This layer's uint8 input."""
        return to_uint8(x.float().mul(1 / self.step).add_(self.zero + 0.5))

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 [..., D] -> float32 [..., D']."""
        return self._multiply(x, 1.0, 0, torch.float32, "none", "")

    def gelu_for(self, x: Tensor, consumer: Int8Linear) -> Tensor:
        """tanh-GELU of the product, uint8 [..., D'] as ``consumer`` reads it: one pass over memory."""
        return self._multiply(x, consumer.step, consumer.zero, torch.uint8, "gelu", "tanh")

    def _multiply(self, x: Tensor, step: float, zero: int, dtype: torch.dtype, post: str, form: str) -> Tensor:
        out = torch.ops.onednn.qlinear_pointwise(
            x.flatten(0, -2), self.step, self.zero, self._weight, self._scales, self._zeros, self._bias,
            step, zero, dtype, post, [], form,
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])


def to_uint8(x: Tensor) -> Tensor:
    """Steps from zero plus a half, float32 -> uint8, rounded and clipped; ``x`` is used up."""
    return x.clamp_(0, 255).to(torch.uint8)


class Int8Block:
    """What ``Block.forward`` computes, with the weights of a fused block."""

    def __init__(self, block: Block, ranges: Sequence[Range]) -> None:
        a, c = block.self_attn, block.cross_attn
        plain = (a.o, c.q, c.o, block.ffn[0], block.ffn[2])
        weights = [a._fused, *((m.weight, m.bias) for m in plain)]
        linears = [Int8Linear(w, b, span) for (w, b), span in zip(weights, ranges, strict=True)]
        self.qkv, self.o, self.cross_q, self.cross_o, self.up, self.down = linears
        self.num_heads, self.eps, self.dtype = a.num_heads, block.eps, a.o.weight.dtype
        # shift, 1 + scale and gate of both halves in one product, with the steps of what comes next taken in
        first, second = 1 / self.qkv.step, 1 / self.up.step
        halves = (self.qkv.zero + 0.5, first, 0.0, self.up.zero + 0.5, second, 0.0)
        self._fold = torch.tensor([first, first, 1.0, second, second, 1.0])[:, None]
        self._base = block.modulation.detach().float() * self._fold + torch.tensor(halves)[:, None]  # [1, 6, D]
        self._norm3 = [x.detach().float() / self.cross_q.step for x in (block.norm3.weight, block.norm3.bias)]
        self._norm3[1] += self.cross_q.zero + 0.5
        root = a.o.weight.shape[0] ** 0.5
        self._norm_qk = root * torch.stack([a.norm_q.weight, a.norm_k.weight]).detach().float()  # [2, D]
        self._norm_cross = root * c.norm_q.weight.detach().float()

    def __call__(
        self,
        x: Tensor,
        time: Tensor,
        layer: int,
        prompt: tuple[Tensor, Tensor],
        rotations: Rotations,
        views: Sequence[CacheView],
    ) -> Tensor:
        """x [B, F, P, D], time [B, F, 6, D] -> float32 [B, F, P, D]."""
        x = x.float()
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            torch.addcmul(self._base, time, self._fold).unsqueeze(3).unbind(2)
        )
        y = torch.addcmul(shift1, self._norm(x), scale1)
        y = self._self_attention(to_uint8(y).flatten(1, 2), layer, rotations, views)
        x = torch.addcmul(x, y.view_as(x), gate1)
        y = F.layer_norm(x, x.shape[-1:], *self._norm3, eps=self.eps)
        x = x + self._cross_attention(to_uint8(y).flatten(1, 2), prompt).view_as(x)
        y = to_uint8(torch.addcmul(shift2, self._norm(x), scale2))
        return torch.addcmul(x, self.down(self.up.gelu_for(y, self.down)), gate2)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def _self_attention(self, x: Tensor, layer: int, rotations: Rotations, views: Sequence[CacheView]) -> Tensor:
        """uint8 [B, L, D] -> [B, L, D]."""
        qk, v = self.qkv(x).split([2 * x.shape[-1], x.shape[-1]], dim=-1)
        q, k = _rms_norm_(qk.unflatten(-1, (2, -1)), self._norm_qk).unbind(2)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        q, k = rotate(q, rotations.query), rotate(k, rotations.key)
        q, k, v = (t.to(self.dtype) for t in (q, k, v))
        out = torch.empty(x.shape)
        for row, view in enumerate(views):
            out[row] = attend_reads(q[row : row + 1], view.read(layer, q[row], k[row], v[row]))[0]
        return self.o(self.o.round(out))

    def _cross_attention(self, x: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
        """uint8 [B, L, D] -> [B, L, D]."""
        q = _rms_norm_(self.cross_q(x), self._norm_cross).to(self.dtype).unflatten(-1, (self.num_heads, -1))
        k, v = (t.expand(len(q), -1, -1, -1) for t in prompt)
        return self.cross_o(self.cross_o.round(attend(q, k, v)))


def _rms_norm_(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in place; ``weight`` carries the square root of the width."""
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-6)).mul_(weight)


class Int8Ranges(nn.Module):
    """The ranges a transformer rounds with, [layers, 6, 2]: part of what its outputs depend on."""

    def __init__(self, ranges: Tensor) -> None:
        super().__init__()
        self.register_buffer("ranges", ranges)


def use_int8(transformer: CausalWanTransformer, path: Path) -> Int8Ranges:
    """Let a fused transformer's blocks run with 8-bit products from now on, in its streams.

    Args:
        path: ranges as ``measure_ranges`` gives them, JSON.

    Raises:
        ValueError: the transformer is not on a CPU, or this CPU or PyTorch has no fast 8-bit products.
        CheckpointError: no ranges there, or not those of this transformer.
    """
    if transformer.device.type != "cpu":
        raise ValueError(f"quantisation 'w8a8' is for CPUs, the model is on {transformer.device}; use device='cpu'")
    if not has_int8():
        raise ValueError("quantisation 'w8a8' needs a CPU with VNNI instructions and PyTorch's oneDNN; leave it out")
    try:
        ranges = torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no activation ranges ({error}); make them: streamdiff-train ranges") from error
    expected = (len(transformer.blocks), len(LAYERS), 2)
    if ranges.shape != expected:
        raise CheckpointError(f"{path}: ranges of shape {tuple(ranges.shape)}, this transformer needs {expected}")
    for block, own in zip(transformer.blocks, ranges.tolist(), strict=True):
        block.int8 = Int8Block(block, own)
    return Int8Ranges(ranges)


def has_int8() -> bool:
    """Whether this CPU and this PyTorch multiply bytes fast."""
    op = getattr(torch.ops.onednn, "qlinear_pointwise", None)
    return op is not None and getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


@contextmanager
def measure_ranges(transformer: CausalWanTransformer) -> Iterator[list[list[list[float]]]]:
    """Watch a float32 transformer while it streams: smallest and largest input of each of ``LAYERS``, per block."""
    ranges = [[[0.0, 0.0] for _ in LAYERS] for _ in transformer.blocks]

    def watch(span: list[float]):
        def see(_: nn.Module, args: tuple) -> None:
            span[:] = min(span[0], args[0].min().item()), max(span[1], args[0].max().item())

        return see

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(watch(span))
        for block, spans in zip(transformer.blocks, ranges, strict=True)
        for name, span in zip(LAYERS, spans, strict=True)
    ]
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()
