"""Transformer blocks with 8-bit products, for a CPU with VNNI instructions, where those are twice as fast as bfloat16.

The six linear layers of a block multiply int8 weights (a scale per output channel) by uint8 activations (one fixed
range per layer, measured once by ``measure_ranges`` and kept beside the weights). Fixed ranges keep the rows of a batch
independent of each other, and sums of integers exact in any order. Between the products numbers are float32; attention
and the cache stay as they are. Text, time, patches and head are left alone. What it costs and saves: ``docs/LOG.md``.

Shapes: B rows, F latent frames, P tokens per frame, L = F * P, D width, n heads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.attention import Rotations, attend, attend_reads
from streamdiff_core.cpu_kernels import define_opaque
from streamdiff_core.dit import Block, CausalWanTransformer
from streamdiff_core.kv_cache import CacheView
from streamdiff_core.rope import rotate
from streamdiff_core.types import CheckpointError

LAYERS = ("self_attn", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
"""Modules of a block whose input is rounded; the first stands for q, k and v."""
RANGES_FILE = "int8_ranges.json"
Range = tuple[float, float]
"""Smallest and largest value; what lies outside is clipped."""


_numbers, _layers = itertools.count(), WeakValueDictionary()
"""Layers by number: a compiled graph is told a layer's number, since it cannot be given a packed weight."""


class Int8Linear:
    """A linear layer from uint8 activations."""

    def __init__(self, weight: Tensor, bias: Tensor, span: Range) -> None:
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        self.step = max(high - low, 1e-6) / 255
        self.zero = round(-low / self.step)
        weight = weight.detach().float()
        self.width = len(weight)
        self._scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._bias = bias.detach().float()
        # as tensors, so that one compiled graph serves all layers
        self._per_step, self._offset = torch.tensor([1 / self.step, self.zero + 0.5]).unbind()
        self.per_step, self.offset, self.dtype = 1 / self.step, self.zero + 0.5, torch.uint8  # for kernels that round
        self._number = torch.tensor(next(_numbers))
        _layers[self._number.item()] = self

    def round(self, x: Tensor) -> Tensor:
        """This layer's uint8 input."""
        return to_uint8(torch.addcmul(self._offset, x.float(), self._per_step))

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 [..., D] -> float32 [..., D']."""
        if torch.compiler.is_compiling():
            return torch.ops.streamdiff.int8_linear(x, self._number, self.width)
        return self._multiply(x, 1.0, 0, torch.float32, "none", "")

    def gelu_for(self, x: Tensor, consumer: Int8Linear) -> Tensor:
        """tanh-GELU of the product, uint8 [..., D'] as ``consumer`` reads it: one pass over memory."""
        if torch.compiler.is_compiling():
            return torch.ops.streamdiff.int8_gelu(x, self._number, consumer._number, self.width)
        return self._multiply(x, consumer.step, consumer.zero, torch.uint8, "gelu", "tanh")

    def _multiply(self, x: Tensor, step: float, zero: int, dtype: torch.dtype, post: str, form: str) -> Tensor:
        out = torch.ops.onednn.qlinear_pointwise(
            x.flatten(0, -2), self.step, self.zero, self._weight, self._scales, self._zeros, self._bias,
            step, zero, dtype, post, [], form,
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])


define_opaque(
    "int8_linear", "Tensor x, Tensor layer, SymInt width",
    lambda x, layer, _: _layers[layer.item()](x),
    lambda x, _, width: x.new_empty(*x.shape[:-1], width, dtype=torch.float32),
)  # fmt: skip
define_opaque(
    "int8_gelu", "Tensor x, Tensor layer, Tensor consumer, SymInt width",
    lambda x, layer, consumer, _: _layers[layer.item()].gelu_for(x, _layers[consumer.item()]),
    lambda x, _, __, width: x.new_empty(*x.shape[:-1], width),
)  # fmt: skip


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
        self.qkv, self.o, self.cross_q, self.cross_o, self.up, self.down = self.linears = linears
        self.num_heads, self.eps, self.dtype = a.num_heads, block.eps, a.o.weight.dtype
        # shift, 1 + scale and gate of both halves in one product, with the steps of what comes next taken in
        first, second = 1 / self.qkv.step, 1 / self.up.step
        halves = (self.qkv.zero + 0.5, first, 0.0, self.up.zero + 0.5, second, 0.0)
        self.fold = torch.tensor([first, first, 1.0, second, second, 1.0])[:, None]
        self.base = block.modulation.detach().float() * self.fold + torch.tensor(halves)[:, None]  # [1, 6, D]
        self.norm3 = [x.detach().float() / self.cross_q.step for x in (block.norm3.weight, block.norm3.bias)]
        self.norm3[1] += self.cross_q.zero + 0.5
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
        seen = self.read(*self.before_cache(x, time), layer, rotations, views)
        return self.after_cache(x, time, seen, *prompt)

    def before_cache(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, F, P, D] -> queries and keys, float32 and not rotated yet, and values of this layer, [B, L, n, d]."""
        shift, scale = self._modulation(time)[:2]
        y = to_uint8(torch.addcmul(shift, self._norm(x.float()), scale)).flatten(1, 2)
        qk, v = self.qkv(y).split([2 * y.shape[-1], y.shape[-1]], dim=-1)
        q, k = _rms_norm(qk.unflatten(-1, (2, -1)), self._norm_qk).unbind(2)
        return tuple(t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v.to(self.dtype)))

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, rotations: Rotations, views: Sequence[CacheView]
    ) -> Tensor:
        """What ``before_cache`` gave, rotated and written -> what each token read, [B, L, D]."""
        q, k = rotate(q, rotations.query).to(self.dtype), rotate(k, rotations.key).to(self.dtype)
        rows = [attend_reads(q[i : i + 1], view.read(layer, q[i], k[i], v[i])) for i, view in enumerate(views)]
        return torch.cat(rows)

    def after_cache(self, x: Tensor, time: Tensor, seen: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What was ``seen`` [B, L, D] is added, then the prompt (k, v as in ``attend``), then the feed-forward."""
        gate1, shift, scale, gate2 = self._modulation(time)[2:]
        x = torch.addcmul(x.float(), self.o(self.o.round(seen)).view_as(x), gate1)
        y = to_uint8(F.layer_norm(x, x.shape[-1:], *self.norm3, eps=self.eps)).flatten(1, 2)
        q = _rms_norm(self.cross_q(y), self._norm_cross).to(self.dtype).unflatten(-1, (self.num_heads, -1))
        x = x + self.cross_o(self.cross_o.round(attend(q, k, v))).view_as(x)
        y = to_uint8(torch.addcmul(shift, self._norm(x), scale))
        return torch.addcmul(x, self.down(self.up.gelu_for(y, self.down)), gate2)

    def _modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate, twice, [B, F, 1, D], of a number of steps where a product follows."""
        return torch.addcmul(self.base, time, self.fold).unsqueeze(3).unbind(2)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm; ``weight`` carries the square root of the width. Outside compiled code ``x`` is used up."""
    divide = x.div if torch.compiler.is_compiling() else x.div_
    return divide(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6)).mul_(weight)


class Int8Ranges(nn.Module):
    """The ranges a transformer rounds with, [layers, 6, 2]: part of what its outputs depend on."""

    def __init__(self, ranges: Tensor) -> None:
        super().__init__()
        self.register_buffer("ranges", ranges)


def load_ranges(path: Path, device: torch.device) -> Int8Ranges:
    """What ``use_int8`` needs, before a transformer is loaded.

    Args:
        path: ranges as ``measure_ranges`` gives them, JSON.
        device: where the transformer will be.

    Raises:
        ValueError: not a CPU, or this CPU or PyTorch has no fast 8-bit products.
        CheckpointError: no ranges there.
    """
    if device.type != "cpu":
        raise ValueError(f"quantisation 'w8a8' is for CPUs, the model is on {device}; use device='cpu'")
    if not has_int8():
        raise ValueError("quantisation 'w8a8' needs a CPU with VNNI instructions and PyTorch's oneDNN; leave it out")
    try:
        return Int8Ranges(torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no activation ranges ({error}); make them: streamdiff-train ranges") from error


def use_int8(transformer: CausalWanTransformer, ranges: Int8Ranges) -> None:
    """Let a fused transformer's blocks run with 8-bit products from now on, in its streams.

    Raises:
        CheckpointError: the ranges are not those of this transformer.
    """
    found, needed = tuple(ranges.ranges.shape), (len(transformer.blocks), len(LAYERS), 2)
    if found != needed:
        raise CheckpointError(f"{RANGES_FILE}: ranges of shape {found}, this transformer needs {needed}")
    for block, own in zip(transformer.blocks, ranges.ranges.tolist(), strict=True):
        block.int8 = Int8Block(block, own)
        block.forget_kernels()


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
