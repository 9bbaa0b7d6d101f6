"""Storage of one stream's keys and values: rows x slots of latent frames, for all layers.

The cache knows slots, not rules: a ``KVPolicy`` decides placement and positions as integers, once per forward, and
every layer follows the same ``RowPlan``. Keys are held rotated to their current temporal position, next to a copy
of just their temporal columns before that rotation; when a map moves a slot, one rotation of those columns brings it
up to date (SEEDS §2.1-3). Token offsets never leave this file.

Shapes: P tokens per frame, n heads, d head dim, t = 2 * temporal RoPE columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamdiff_core.config import ModelConfig
from streamdiff_core.rope import rotate, temporal_rotation
from streamdiff_core.types import KVPolicy, RowPlan


class KVCache:
    """Keys and values of one stream. A new stream is a new object: nothing can leak from an old one (SPEC §2.8-1)."""

    def __init__(
        self,
        model: ModelConfig,
        policy: KVPolicy,
        *,
        num_rows: int,
        tokens_per_frame: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate [rows, slots, tokens, heads, head_dim] per layer, once; ``nbytes`` never changes afterwards."""
        self.model, self.policy = model, policy
        self.num_rows, self.tokens_per_frame = num_rows, tokens_per_frame
        self.tables = [policy.new_table() for _ in range(num_rows)]
        self._rotated_to: list[list[list[int | None]]] = [
            [[None] * policy.num_slots for _ in range(num_rows)] for _ in range(model.num_layers)
        ]
        shape = (num_rows, policy.num_slots, tokens_per_frame, model.num_heads, model.head_dim)
        time_shape = (*shape[:-1], 2 * model.rope_columns[0])
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]
        self._k_time = [torch.zeros(time_shape, dtype=dtype, device=device) for _ in range(model.num_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for group in (self.k, self.v, self._k_time) for x in group)

    def begin(self, row: int, frame_ids: Sequence[int], descriptor: Any = None) -> CacheView:
        """Plan one row of one forward and return the view that all layers share."""
        return CacheView(self, row, self.policy.plan(self.tables[row], frame_ids, descriptor))

    def fork(self, src: int, dst: Sequence[int]) -> None:
        """Copy row ``src`` onto rows ``dst``: slots, table and positions."""
        table = self.tables[src]
        for row in dst:
            new = self.policy.new_table()
            new.frames, new.is_sink = list(table.frames), list(table.is_sink)
            new.descriptors = dict(table.descriptors)
            self.tables[row] = new
            for layer in range(self.model.num_layers):
                for store in (self.k, self.v, self._k_time):
                    store[layer][row].copy_(store[layer][src])
                self._rotated_to[layer][row] = list(self._rotated_to[layer][src])

    def clear(self) -> None:
        """Forget everything; used by the prompt switches ``flush`` and ``reset``."""
        self.tables = [self.policy.new_table() for _ in range(self.num_rows)]
        for layer in self._rotated_to:
            for row in layer:
                row[:] = [None] * len(row)

    def keep_recent(self, num_frames: int, rows: Sequence[int] | None = None) -> None:
        """Keep the sinks and the newest ``num_frames`` of the window, packed; in all rows unless told which."""
        for row in range(self.num_rows) if rows is None else rows:
            table = self.tables[row]
            window = [s for s, f in enumerate(table.frames) if f is not None and not table.is_sink[s]]
            kept = sorted(window, key=lambda s: table.frames[s])[-num_frames:] if num_frames else []
            moves = list(zip(sorted(kept), window, strict=False))  # (from, to), to <= from: safe in this order
            for src, dst in moves:
                table.frames[dst] = table.frames[src]
                table.descriptors[dst] = table.descriptors.get(src)
                for layer in range(self.model.num_layers):
                    for store in (self.k, self.v, self._k_time):
                        store[layer][row, dst].copy_(store[layer][row, src])
                    self._rotated_to[layer][row][dst] = self._rotated_to[layer][row][src]
            for slot in window[len(moves) :]:
                table.frames[slot] = None
                table.descriptors.pop(slot, None)

    def describe(self, row: int = 0) -> list[dict[str, Any]]:
        """Filled slots as dicts (slot, role, frame, position), for pictures of the cache."""
        table, at = self.tables[row], self._rotated_to[-1][row]
        return [
            {"slot": s, "role": "sink" if table.is_sink[s] else "window", "frame": f, "position": at[s]}
            for s, f in enumerate(table.frames)
            if f is not None
        ]


class CacheView:
    """One row of one forward: writes the chunk's keys and values, returns everything visible."""

    def __init__(self, cache: KVCache, row: int, plan: RowPlan) -> None:
        self.cache, self.row, self.plan = cache, row, plan

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the chunk and bring moved slots to their position.

        Args:
            k: [F * P, n, d], spatial RoPE applied, temporal RoPE not.
            v: [F * P, n, d].

        Returns:
            Visible keys (fully rotated) and values, each [N * P, n, d] (views of the storage, no copy).
        """
        cache, row, plan = self.cache, self.row, self.plan
        keys, values, time = cache.k[layer][row], cache.v[layer][row], cache._k_time[layer][row]
        at = cache._rotated_to[layer][row]
        width = time.shape[-1]
        k_frames = k.unflatten(0, (-1, cache.tokens_per_frame))  # [F, P, n, d]
        v_frames = v.unflatten(0, (-1, cache.tokens_per_frame))
        for slot, j in plan.writes:
            keys[slot, ..., width:] = k_frames[j, ..., width:]
            time[slot] = k_frames[j, ..., :width]
            values[slot] = v_frames[j]
            at[slot] = None
        for slot, position in enumerate(plan.slot_positions):
            if at[slot] != position:
                turn = temporal_rotation((position,), cache.model.rope_columns, keys.dtype, keys.device)
                keys[slot, ..., :width] = rotate(time[slot], turn)
                at[slot] = position
        return keys[: plan.num_visible].flatten(0, 1), values[: plan.num_visible].flatten(0, 1)

    def query_rotation(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Temporal multiplier [F, columns] of the chunk's queries."""
        return temporal_rotation(self.plan.query_positions, self.cache.model.rope_columns, dtype, device)
