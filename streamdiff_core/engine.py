"""Packs rows, of one or many sessions, into one forward of the transformer.

A row brings its own cache view, noise level, position and prompt, so rows of different streams and denoising steps
share a batch freely. Cache decisions are taken here, once per forward, before the first layer runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from streamdiff_core.attention import PromptContext
from streamdiff_core.attention_choice import preferring
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.flow import x0_from_velocity
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.types import RowOp


class Engine:
    """Runs rows on one transformer."""

    def __init__(self, transformer: CausalWanTransformer) -> None:
        self.transformer = transformer
        self.attention: list[SDPBackend] | None = None
        """Attention kernels in order of preference; None: PyTorch's choice."""

    @torch.inference_mode()
    def forward(self, rows: Sequence[tuple[KVCache, RowOp]]) -> list[Tensor]:
        """x0 prediction [F, C, h, w] of each row, in order.

        Rows with equal shapes run as one batch; a batch never holds two rows of the same cache row.

        Raises:
            ValueError: two rows write the same cache row.
        """
        x0s: list[Tensor] = [row.xt for _, row in rows]
        for members in batches(rows):
            for i, x0 in zip(members, self._forward_batch([rows[i] for i in members]), strict=True):
                x0s[i] = x0
        return x0s

    def rewrite(self, rows: Sequence[tuple[KVCache, RowOp]]) -> None:
        """Run rows only for what they leave in the cache."""
        self.forward(rows)

    def encode_prompt(self, context: Tensor) -> PromptContext:
        """Prompt tokens [1, text_len, text_dim] -> what rows carry as their prompt."""
        return self.transformer.encode_prompt(context)

    def _forward_batch(self, rows: Sequence[tuple[KVCache, RowOp]]) -> list[Tensor]:
        xt = torch.stack([row.xt for _, row in rows]).contiguous()  # [B, F, C, h, w]; sums follow strides
        frames = xt.shape[1]
        timestep = torch.tensor(
            [r.timestep if isinstance(r.timestep, tuple) else (r.timestep,) * frames for _, r in rows],
            dtype=torch.float64 if xt.dtype == torch.float64 else torch.float32,
        ).to(xt.device, non_blocking=True)  # made on the device, it would wait for all work queued there
        views = [cache.begin(row.cache_row, row.frame_ids, row.descriptor, row.prompt) for cache, row in rows]
        with preferring(self.attention):
            velocity = self.transformer(xt, timestep, [row.prompt for _, row in rows], views)
        return [x0_from_velocity(x, v, _level(row)) for x, v, (_, row) in zip(xt, velocity, rows, strict=True)]


def batches(rows: Sequence[tuple[KVCache, RowOp]]) -> list[list[int]]:
    """Indices of rows that run together: those of equal shape.

    Raises:
        ValueError: two rows write the same cache row.
    """
    keys = [(id(cache), row.cache_row) for cache, row in rows]
    if len(set(keys)) < len(keys):
        raise ValueError("two rows of one forward use the same cache row; run them one after the other")
    groups: dict[torch.Size, list[int]] = {}
    for i, (_, row) in enumerate(rows):
        groups.setdefault(row.xt.shape, []).append(i)
    return list(groups.values())


def _level(row: RowOp) -> float | Tensor:
    """Noise level of the row, or of each of its latent frames [F]."""
    return torch.tensor(row.sigma, dtype=torch.float64) if isinstance(row.sigma, tuple) else row.sigma
