"""``torch.compile`` for the transformer, where it can help and change nothing else: the arithmetic around the cache.

A forward is one compiled graph. In the middle of every block it calls back, for reading the cache: slots and positions
are Python integers that change in every forward, and the rotations are complex; so nothing is compiled again while a
stream runs. 8-bit products stay oneDNN's. The first forward of each shape takes a minute. Off by default; results
differ by rounding.

Shapes: B rows, F latent frames, P tokens per frame, L = F * P, D width, n heads, d head dim.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.attention import Rotations
from streamdiff_core.cpu_kernels import define_opaque, linear_gelu
from streamdiff_core.dit import Block, CausalWanTransformer, Tokens, modulate, prompt_rows

_now = threading.local()
"""``read``: what the running forward of a thread reads its cache with, ``(q, k, v, layer)`` -> [B, L, D]."""
define_opaque(
    "read_cache", "Tensor q, Tensor k, Tensor v, int layer", lambda *args: _now.read(*args),
    lambda q, k, v, layer: v.new_empty(*v.shape[:2], v.shape[2] * v.shape[3]),
)  # fmt: skip


def compile_blocks(transformer: CausalWanTransformer, backend: str | Callable = "inductor") -> CausalWanTransformer:
    """Have every forward over a cache run compiled, in place. It is compiled when it first runs.

    Raises:
        ValueError: no C++ compiler, which ``inductor`` needs on a CPU.
    """
    if backend == "inductor" and transformer.device.type == "cpu" and not has_compiler():
        raise ValueError(
            "compiling for a CPU needs a C++ compiler (g++ or clang++); install one, or leave out --compile"
        )
    plain, (_, patch_height, patch_width) = transformer.forward, transformer.config.patch_size
    parts = [_PlainBlock(block) if block.int8 is None else block.int8 for block in transformer.blocks]

    def around_cache(xt: Tensor, timestep: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        tokens = transformer.embed(xt, timestep)
        x = tokens.x
        read = torch.ops.streamdiff.read_cache if torch.compiler.is_compiling() else _now.read
        for layer, (part, prompt) in enumerate(zip(parts, prompts, strict=True)):
            seen = read(*part.before_cache(x, tokens.time6), layer)
            x = part.after_cache(x, tokens.time6, seen, *prompt)
        return transformer.predict(Tokens(x.to(tokens.x.dtype), tokens.time, tokens.time6), xt, timestep)

    compiled = torch.compile(around_cache, dynamic=False, backend=backend)

    def forward(xt, timestep, prompts, views=None, *, mask=None, frame_ids=None):  # as CausalWanTransformer.forward
        if views is None:
            return plain(xt, timestep, prompts, mask=mask, frame_ids=frame_ids)
        like = torch.empty(xt.shape[:2], dtype=transformer.dtype, device=transformer.device)
        grid = (xt.shape[-2] // patch_height, xt.shape[-1] // patch_width)
        rotations = transformer.rotations(*grid, like, views)
        _now.read = lambda q, k, v, layer: parts[layer].read(q, k, v, layer, rotations, views)
        try:
            return compiled(xt, timestep, [prompt_rows(prompts, layer) for layer in range(len(parts))])
        finally:
            del _now.read  # it holds a stream's memory

    transformer.forward = forward
    return transformer


class _PlainBlock:
    """A block in three parts, as ``Int8Block`` has them."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def before_cache(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, F, P, D], time [B, F, 6, D] -> queries, keys and values [B, L, n, d] of this layer."""
        shift, scale = self._modulation(time)[:2]
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=self.block.eps), shift, scale)
        return self.block.self_attn.project(y.flatten(1, 2))

    def read(self, q: Tensor, k: Tensor, v: Tensor, layer: int, rotations: Rotations, views: Sequence) -> Tensor:
        """What ``before_cache`` gave, rotated and written -> what each token read, [B, L, D]."""
        return self.block.self_attn.read(q, k, v, layer, rotations, views, None)

    def after_cache(self, x: Tensor, time: Tensor, seen: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What was ``seen`` [B, L, D] is added, then the prompt (k, v as in ``attend``), then the feed-forward."""
        block, (gate1, shift, scale, gate2) = self.block, self._modulation(time)[2:]
        x = torch.addcmul(x, block.self_attn.o(seen).view_as(x), gate1)
        x = x + block.cross_attn(block.norm3(x).flatten(1, 2), k, v).view_as(x)
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=block.eps), shift, scale)
        return torch.addcmul(x, block.ffn[2](linear_gelu(y, block.ffn[0])), gate2)

    def _modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate, twice, [B, F, 1, D]."""
        return (self.block.modulation + time).unsqueeze(3).unbind(2)


def is_compiled(transformer: CausalWanTransformer) -> bool:
    """Whether ``compile_blocks`` was here."""
    return "forward" in vars(transformer)


def has_compiler() -> bool:
    """Whether a C++ compiler is on the path."""
    return any(map(shutil.which, ("g++", "clang++", "c++", "cl")))
