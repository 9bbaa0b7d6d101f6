"""Two faster ways to compute the same thing on a CPU in bfloat16, chosen by measurement.

PyTorch's fused attention reaches a third of the matrix peak there, because its softmax works in float32; two batched
products and a bfloat16 softmax reach more than half (measured in ``docs/LOG.md``). The tanh-GELU of a feed-forward
layer costs as much as its product; oneDNN computes both in one pass. Everything else, and every other device and
number type, takes PyTorch's own functions.

Shapes: B rows, L queries, N keys, n heads, d head dim, D width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core import native_kernels

MAX_SCORES = 1 << 25
"""Largest score matrix (numbers) that is written out; beyond it fused attention saves memory."""
_thread = threading.local()


def is_fast_case(*tensors: Tensor) -> bool:
    """CPU, bfloat16, nothing to differentiate."""
    return all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors) and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    )


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, scale 1/sqrt(d): q [B, n, L, d], k and v [B, n, N, d] -> [B, n, L, d]."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if mask is not None or scores > MAX_SCORES or not is_fast_case(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if torch.compiler.is_compiling():  # a compiled graph looks after memory itself
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v
    if native_kernels.fits(q.shape[3]) and native_kernels.is_ready():
        out = torch.empty(len(q), q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)  # [B, L, n, d]
        for row in range(len(q)):
            at = row if len(k) > 1 else 0
            native_kernels.attend(*(x.transpose(0, 1) for x in (q[row], k[at], v[at])), out[row].flatten(1))
        return out.transpose(1, 2)
    weights = _scratch(*q.shape[:3], k.shape[2])
    torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2), out=weights)
    return torch.matmul(torch.softmax(weights, dim=-1, out=weights), v)


def _scratch(*shape: int) -> Tensor:
    """Memory for a score matrix, the same for every call of a thread: fresh megabytes cost more than the product,
    since the system hands them out page by page and the C library gives them back at once.
    """
    size = math.prod(shape)
    held = getattr(_thread, "scores", None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            held = _thread.scores = torch.empty(size, dtype=torch.bfloat16)
    return held[:size].view(shape)


def linear_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """tanh-GELU of a linear layer, [..., D] -> [..., D']."""
    plain = type(linear.weight) is nn.Parameter  # and not a quantised tensor
    if _HAS_FUSED_GELU and plain and is_fast_case(x, linear.weight):
        fused = torch.ops.streamdiff.linear_gelu if torch.compiler.is_compiling() else _fused_gelu
        return fused(x, linear.weight, linear.bias)
    return F.gelu(linear(x), approximate="tanh")


def define_opaque(name: str, arguments: str, compute: Callable[..., Tensor], like: Callable[..., Tensor]) -> None:
    """An operation ``torch.ops.streamdiff.<name>`` that a compiled graph calls without looking inside.

    Args:
        arguments: their declaration, for instance ``Tensor x, SymInt width``.
        compute: does it.
        like: from the same arguments, an empty tensor of the result's shape and number type.
    """
    torch.library.define(f"streamdiff::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"streamdiff::{name}", "default", lambda *args: _uncompiled(compute)(*args))
    torch.library.register_fake(f"streamdiff::{name}", like)


@cache
def _uncompiled(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Not at import: it brings the compiler, a second."""
    return torch.compiler.disable(compute)


def _fused_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")


def _has_fused_gelu() -> bool:
    """Whether this build of PyTorch has oneDNN's linear + GELU and it runs."""
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16)
        _fused_gelu(one, one, one[0])
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


_HAS_FUSED_GELU = _has_fused_gelu()
define_opaque(
    "linear_gelu", "Tensor x, Tensor weight, Tensor bias", _fused_gelu,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)),
)  # fmt: skip
