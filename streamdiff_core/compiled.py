"""``torch.compile`` for the transformer, where it can help and change nothing else: the arithmetic around the cache.

A block is compiled in two pieces, before and after it reads the cache; what comes before and after all blocks is
compiled too. The cache itself, whose slots and positions are Python integers that change in every forward, and the
complex rotations stay as they are; so nothing is compiled again while a stream runs. 8-bit products stay oneDNN's. The
first forward of each shape takes a minute. Off by default; results differ by rounding.

Shapes: B rows, F latent frames, P tokens per frame, L = F * P, D width, n heads, d head dim.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.cpu_kernels import linear_gelu
from streamdiff_core.dit import Block, CausalWanTransformer, modulate
from streamdiff_core.int8_blocks import Int8Block


def compile_blocks(transformer: CausalWanTransformer, backend: str | Callable = "inductor") -> CausalWanTransformer:
    """Have every block run compiled pieces, in place; all blocks share them. They are made at the first forward.

    Raises:
        ValueError: no C++ compiler, which ``inductor`` needs on a CPU.
    """
    if backend == "inductor" and transformer.device.type == "cpu" and not has_compiler():
        raise ValueError(
            "compiling for a CPU needs a C++ compiler (g++ or clang++); install one, or leave out --compile"
        )

    def compiled(piece: Callable) -> Callable:
        return torch.compile(piece, dynamic=False, backend=backend)

    before, after, before8, after8 = map(
        compiled, (before_cache, after_cache, Int8Block.before_cache, Int8Block.after_cache)
    )

    def in_pieces(block: Block) -> Callable[..., Tensor]:
        def forward(x, time, layer, prompt, rotations, views, mask):  # as Block.forward
            if block.int8 is not None and views is not None:
                x = x.float()
                seen = block.int8.read(*before8(block.int8, x, time), layer, rotations, views)
                return after8(block.int8, x, time, seen, *prompt)
            modulation = (block.modulation + time).unsqueeze(3).unbind(2)  # shift, scale, gate, twice: [B, F, 1, D]
            q, k, v = before(block, x, *modulation[:2])
            seen = block.self_attn.read(q, k, v, layer, rotations, views, mask)
            return after(block, x, seen, *prompt, *modulation[2:])

        return forward

    for block in transformer.blocks:
        block.forward = in_pieces(block)
    transformer.embed, transformer.predict = compiled(transformer.embed), compiled(transformer.predict)
    return transformer


def before_cache(block: Block, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, F, P, D] -> queries, keys and values [B, L, n, d] of this layer."""
    y = modulate(F.layer_norm(x, x.shape[-1:], eps=block.eps), shift, scale)
    return block.self_attn.project(y.flatten(1, 2))


def after_cache(
    block: Block, x: Tensor, seen: Tensor, k: Tensor, v: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor,
    gate2: Tensor,
) -> Tensor:  # fmt: skip
    """What was ``seen`` [B, L, D] is added, then the prompt (k, v [B or 1, text_len, n, d]), then the feed-forward."""
    x = torch.addcmul(x, block.self_attn.o(seen).view_as(x), gate1)
    x = x + block.cross_attn(block.norm3(x).flatten(1, 2), k, v).view_as(x)
    y = modulate(F.layer_norm(x, x.shape[-1:], eps=block.eps), shift, scale)
    return torch.addcmul(x, block.ffn[2](linear_gelu(y, block.ffn[0])), gate2)


def is_compiled(transformer: CausalWanTransformer) -> bool:
    """Whether ``compile_blocks`` was here."""
    return any("forward" in vars(block) for block in transformer.blocks)


def has_compiler() -> bool:
    """Whether a C++ compiler is on the path."""
    return any(map(shutil.which, ("g++", "clang++", "c++", "cl")))
