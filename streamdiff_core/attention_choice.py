"""Which of PyTorch's attention kernels is fastest here: measured on a GPU when the first stream starts.

PyTorch takes cuDNN's, flash, memory-efficient or plain attention by fixed rules; which one wins depends on the card,
the shape and the version. The order found is only a preference: a call that the first cannot do goes to the next.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
REPEATS = 5


def time_call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start_s = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start_s)


@torch.inference_mode()
def rank_backends(
    num_heads: int,
    head_dim: int,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    time_ms: Callable[[Callable[[], object], torch.device], float] = time_call_ms,
) -> list[SDPBackend]:
    """Kernels that can attend in this shape, fastest first (best of five calls after one to warm up)."""
    q, k, v = (
        torch.randn(1, num_heads, length, head_dim, dtype=dtype, device=device)
        for length in (num_queries, num_keys, num_keys)
    )
    found = {}
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            try:
                F.scaled_dot_product_attention(q, k, v)
                found[backend] = min(
                    time_ms(lambda: F.scaled_dot_product_attention(q, k, v), device) for _ in range(REPEATS)
                )
            except RuntimeError:  # not for this device, number type or head size
                continue
    return sorted(found, key=found.__getitem__)


def preferring(backends: Sequence[SDPBackend] | None) -> contextlib.AbstractContextManager:
    """Inside, attention takes the first of these kernels that can; None: PyTorch's own rules."""
    return sdpa_kernel(list(backends), set_priority=True) if backends else contextlib.nullcontext()
