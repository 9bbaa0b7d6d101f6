"""Pieces of tensor work that several policies share; each is an ``Edit`` or part of one (see ``types.RowPlan``).

Keys are compared and averaged raw, that is without temporal rotation: their position then does not matter, and a mean
of keys is a key (SEEDS §2.1-3). Queries come rotated; ``raw_query_sum`` turns their sum back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.rope import rotate, temporal_rotation


@dataclass(frozen=True)
class Copy:
    """Slot ``dst`` becomes a copy of ``src``."""

    src: int
    dst: int

    def __call__(self, slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Run in one layer."""
        slots.copy(self.src, self.dst)


@dataclass(frozen=True)
class Blend:
    """``dst = keep * dst + (1 - keep) * src``, token by token.

    A cache in half precision would round a step of 1/1000 away and the mean would never move; there the mean is held
    in float32 next to the slot.
    """

    src: int
    dst: int
    keep: float

    def __call__(self, slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Run in one layer."""
        mean = torch.stack([slots.raw_keys(self.dst), slots.v[self.dst]])
        if mean.dtype in (torch.bfloat16, torch.float16):
            mean = slots.state.setdefault(f"mean{self.dst}", mean.float())
        new = torch.stack([slots.raw_keys(self.src), slots.v[self.src]])
        mean.lerp_(new.to(mean.dtype), 1 - self.keep)
        slots.put(self.dst, *mean.to(slots.k.dtype))


def raw_query_sum(slots: LayerSlots, q: Tensor) -> Tensor:
    """Sum over tokens of a chunk's queries [F, P, n, d], temporal rotation undone: [F, n, d]."""
    turn = temporal_rotation(slots.plan.query_positions, slots.model.rope_columns, q.dtype, q.device)
    return rotate(q.sum(1), turn.conj())


def describe_written(slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keep the mean raw key of every slot as ``scratch["mean_key"]`` [slots, n, d]."""
    means = slots.scratch.setdefault("mean_key", torch.zeros_like(slots.k[:, 0]))
    for slot, j in slots.plan.writes:
        means[slot] = k[j].mean(0)
