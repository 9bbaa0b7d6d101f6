"""What lies between a transformer's matrix products, in C++: for CPUs with AVX512-BF16, if g++ is there to compile it.

PyTorch reads and writes memory once per operation, and each of a block's hundred small operations costs some
microseconds of Python. Here attention is one pass (the scores of 64 queries and 128 keys at a time, rescaled as larger
ones turn up: Dao et al., FlashAttention, arXiv:2205.14135), and so is a residual sum with its norm. Everything has a
twin in PyTorch, which is used where this cannot be: ``cpu_kernels``, ``dit``, ``int8_blocks``, ``rope``.
The source is compiled once per machine, in three seconds, and kept in the user's cache folder.

Shapes: L queries, N keys, n heads, d head dim, T tokens, D width, G groups of tokens with a modulation of their own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma",
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "bf16")),
)  # fmt: skip
PANEL = 64
"""Outputs of a layer that are computed together."""
COMPILE_S = 120.0
"""A compiler that takes longer is given up."""
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "attend": [*[_POINTER, _LONG, _LONG] * 3, _POINTER, *[_INT] * 5, _FLOAT, _FLOAT],
    "add_norm": [
        _POINTER, _POINTER, _INT, *[_POINTER] * 5, _INT, _LONG, _INT, _LONG, _LONG, _LONG, _FLOAT,
    ],
    "norm_rotate": [_POINTER, _INT, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT, _INT, _FLOAT],
    "linear": [*[_POINTER] * 4, _LONG, _LONG, _LONG, _INT],
    "turn": [*[_POINTER, _LONG, _LONG, _LONG] * 2, _POINTER, *[_INT] * 4],
}  # fmt: skip


class _Kernels:
    """The compiled library of this process."""

    lock = threading.Lock()
    library: ctypes.CDLL | None = None
    was_tried = False
    is_switched_off = False


def is_ready() -> bool:
    """Whether the kernels can be called. The first question compiles and loads them, if this machine can."""
    if not _Kernels.was_tried:
        with _Kernels.lock:
            if not _Kernels.was_tried:
                _Kernels.library = _load() if runs_here() and shutil.which("g++") else None
                _Kernels.was_tried = True
    return _Kernels.library is not None and not _Kernels.is_switched_off


def runs_here() -> bool:
    """Whether this CPU has the instructions and this system the library format."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return sys.platform.startswith("linux") and platform.machine() == "x86_64" and has_bf16()


@contextmanager
def switched_off() -> Iterator[None]:
    """PyTorch's own operations inside, in the whole process: to count them, or to compare."""
    before, _Kernels.is_switched_off = _Kernels.is_switched_off, True
    try:
        yield
    finally:
        _Kernels.is_switched_off = before


def fits(head_dim: int) -> bool:
    """Whether attention with heads of this width has a kernel; norms take every model of such heads."""
    return head_dim % 64 == 0 and 0 < head_dim <= 256


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, per_step: float = 1.0, offset: float = 0.0) -> Tensor:
    """Softmax attention of one row, scale 1/sqrt(d).

    Args:
        q: [L, n, d] bfloat16; tokens and heads may lie anywhere, a head's numbers side by side.
        k: [N, n, d] likewise.
        v: [N, n, d] likewise.
        out: [L, n * d], contiguous: bfloat16, or uint8 for ``result * per_step + offset``, rounded down and clipped.

    Returns:
        ``out``.
    """
    (queries, heads, dim), n = q.shape, len(k)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and out.is_contiguous() and n > 0
    _Kernels.library.attend(
        q.data_ptr(), q.stride(0), q.stride(1), k.data_ptr(), k.stride(0), k.stride(1),
        v.data_ptr(), v.stride(0), v.stride(1), out.data_ptr(), out.dtype == torch.uint8,
        queries, n, heads, dim, per_step, offset,
    )  # fmt: skip
    return out


def add_norm(
    residual: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    sum_out: Tensor | None,
    modulation: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    eps: float,
) -> None:
    """``sum_out = residual + added * gate``, and ``out = shift + layer_norm(sum_out) * scale``.

    Args:
        residual: [T, D] float32, contiguous like all here.
        added: [T, D] float32 or bfloat16; None: ``residual`` itself is normalised.
        gate: [G, D] float32, T / G tokens each; None: 1.
        sum_out: [T, D] float32, may be ``residual``.
        modulation: shift and scale, [G, D] float32; [D] for all tokens.
        out: [T, D] bfloat16, or uint8, rounded down and clipped; None: the sum alone.
    """
    width = residual.shape[-1]
    tokens = residual.numel() // width
    shift, scale = modulation or (None, None)
    groups = max([len(m) for m in (gate, shift) if m is not None and m.ndim > 1], default=1)
    _Kernels.library.add_norm(
        residual.data_ptr(), _pointer(added), added is not None and added.dtype == torch.bfloat16,
        _pointer(gate), _pointer(sum_out), _pointer(shift), _pointer(scale), _pointer(out),
        out is not None and out.dtype == torch.uint8, tokens, width, tokens // groups,
        _step(gate), _step(shift), eps,
    )  # fmt: skip


def norm_rotate(x: Tensor, weight: Tensor | None, rotation: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """RMS norm over the width, then RoPE, in bfloat16.

    Args:
        x: [B, L, D] float32 or bfloat16; may be a column slice of [B, L, more].
        weight: [D] float32; None: no norm.
        rotation: complex64 [L, d / 2] or [B, L, d / 2], contiguous; None: none.

    Returns:
        [B, L, n, d].
    """
    batch, length, width = x.shape
    assert x.stride(2) == 1 and (batch == 1 or x.stride(0) == length * x.stride(1))
    dim = width // num_heads
    out = torch.empty(batch, length, num_heads, dim, dtype=torch.bfloat16)
    period = 1 if rotation is None else 2 * rotation.numel() // dim
    _Kernels.library.norm_rotate(
        x.data_ptr(), x.dtype == torch.bfloat16, x.stride(1), _pointer(weight), _pointer(rotation), period,
        out.data_ptr(), batch * length, width, dim, eps,
    )  # fmt: skip
    return out


def pack(weight: Tensor) -> Tensor:
    """A layer's weight [D', D] bfloat16, D' a multiple of 64, as ``linear`` reads it: a copy of the same size."""
    pairs = weight.detach().contiguous().view(torch.int32)  # [D', D / 2]
    return pairs.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def linear(x: Tensor, packed: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """Linear layer, or its tanh-GELU, in bfloat16: x [..., D], contiguous, and bias [D'] float32 -> [..., D']."""
    width, outputs = x.shape[-1], len(bias)
    out = torch.empty(*x.shape[:-1], outputs, dtype=torch.bfloat16)
    _Kernels.library.linear(
        x.data_ptr(), packed.data_ptr(), bias.data_ptr(), out.data_ptr(), x.numel() // width, width, outputs, gelu
    )
    return out


def turn(raw: Tensor, keys: Tensor, rotation: Tensor) -> None:
    """First columns of ``keys`` [slots, P, n, d] = ``raw`` [slots, P, n, 2c] turned by complex64 [slots, c]."""
    slots, tokens, heads, numbers = raw.shape
    _Kernels.library.turn(
        raw.data_ptr(), *raw.stride()[:3], keys.data_ptr(), *keys.stride()[:3], rotation.data_ptr(),
        slots, tokens, heads, numbers,
    )  # fmt: skip


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _step(x: Tensor | None) -> int:
    """From one group's modulation to the next."""
    return 0 if x is None or x.ndim == 1 else x.stride(0)


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("the CPU kernels could not be compiled, PyTorch's operations are used: %s", detail)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _compiled() -> Path:
    """The library's file, made if it is not there; a half-written one is never seen."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamdiff"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="streamdiff-"))
    file = folder / f"kernels-{key}.so"
    if not file.exists():
        logger.info("compiling the CPU kernels, once")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "kernels.so"
            command = ["g++", *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
            os.replace(made, file)
    return file


if __name__ == "__main__":  # while setting up, so that no first stream waits for it
    print("CPU kernels:", "ready" if is_ready() else "not on this machine; PyTorch's operations are used")
