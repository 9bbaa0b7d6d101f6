"""Storage of one stream's keys and values: rows x slots of latent frames, for all layers.

The cache knows slots, not rules: a ``KVPolicy`` decides placement and positions as integers, once per forward, and
every layer follows the same ``RowPlan``. Keys are held rotated to their current temporal position, next to a copy
of just their temporal columns before that rotation; when a map moves a slot, one rotation of those columns brings it
up to date (SEEDS §2.1-3). Token offsets never leave this file.

Shapes: P tokens per frame, n heads, d head dim, t = 2 * temporal RoPE columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamdiff_core import native_kernels
from streamdiff_core.config import ModelConfig
from streamdiff_core.rope import rotate, temporal_rotation
from streamdiff_core.types import TOKENS, KVPolicy, Read, RowPlan


def heads_first(store: Tensor) -> Tensor:
    """[rows, slots, P, n, d] laid out in memory by head: what a head reads is one block, and no product copies it."""
    return store.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


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
        shape = (num_rows, policy.num_slots, tokens_per_frame, model.num_heads)
        self.k, self.v, self._k_time = (
            [heads_first(torch.zeros(*shape, width, dtype=dtype, device=device)) for _ in range(model.num_layers)]
            for width in (model.head_dim, model.head_dim, 2 * model.rope_columns[0])
        )
        self._scratch, self._state = self._nothing(), self._nothing()

    def _nothing(self) -> list[list[dict[str, Tensor]]]:
        """An empty dict per layer and row."""
        return [[{} for _ in range(self.num_rows)] for _ in range(self.model.num_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        extra = [x for group in (self._scratch, self._state) for layer in group for row in layer for x in row.values()]
        return sum(x.numel() * x.element_size() for group in (self.k, self.v, self._k_time, extra) for x in group)

    def begin(self, row: int, frame_ids: Sequence[int], descriptor: Any = None, prompt: Any = None) -> CacheView:
        """Plan one row of one forward and return the view that all layers share."""
        return CacheView(self, row, self.policy.plan(self.tables[row], frame_ids, descriptor), prompt)

    def layer_slots(self, layer: int, row: int, prompt: Any = None, plan: RowPlan | None = None) -> LayerSlots:
        """One row's slots in one layer."""
        return LayerSlots(
            layer, self.model, self.k[layer][row], self.v[layer][row], self._k_time[layer][row],
            self._rotated_to[layer][row], self._scratch[layer][row], self._state[layer][row], self._state[0][row],
            prompt, plan,
        )  # fmt: skip

    def fork(self, src: int, dst: Sequence[int]) -> None:
        """Copy row ``src`` onto rows ``dst``: slots, table and positions."""
        for row in dst:
            self._copy_row(self, src, row)

    def take_over(self, other: KVCache, row: int) -> None:
        """Fill all rows with what one row of another cache of this model holds.

        Under an equal policy that is a copy. Under other settings its latent frames enter one by one, oldest first, as
        if each had just come: the oldest become the sinks, the newest stay in the window. A policy that mixes or
        rebuilds what it holds cannot take frames in this way: its cache stays empty.
        """
        if self.policy == other.policy:
            self._copy_row(other, row, 0)
        else:
            self._admit_frames(other, row)
        self.fork(0, range(1, self.num_rows))

    def _copy_row(self, other: KVCache, src: int, dst: int) -> None:
        self.tables[dst] = other.tables[src].copy()
        for layer in range(self.model.num_layers):
            for mine, theirs in ((self.k, other.k), (self.v, other.v), (self._k_time, other._k_time)):
                mine[layer][dst].copy_(theirs[layer][src])
            self._rotated_to[layer][dst] = list(other._rotated_to[layer][src])
            for mine, theirs in ((self._scratch, other._scratch), (self._state, other._state)):
                mine[layer][dst] = {name: x.clone() for name, x in theirs[layer][src].items()}

    def _admit_frames(self, other: KVCache, row: int) -> None:
        old, table, came_from = other.tables[row], self.policy.new_table(), {}
        for frame in sorted({f for f in old.frames if f is not None}):
            plan = None if frame == TOKENS else self.policy.plan(table, (frame,))
            if plan is None or plan.edits:
                return
            came_from |= {slot: old.slots_of(frame)[0] for slot, _ in plan.writes}
        table.descriptors = {dst: old.descriptors[src] for dst, src in came_from.items() if src in old.descriptors}
        self.tables[0] = table
        for layer in range(self.model.num_layers):
            mine, theirs = self.layer_slots(layer, 0), other.layer_slots(layer, row)
            for dst, src in came_from.items():
                mine.put(dst, theirs.raw_keys(src), theirs.v[src])

    def clear(self) -> None:
        """Forget everything; used by the prompt switches ``flush`` and ``reset``."""
        self.tables = [self.policy.new_table() for _ in range(self.num_rows)]
        for layer in self._rotated_to:
            for row in layer:
                row[:] = [None] * len(row)
        self._scratch, self._state = self._nothing(), self._nothing()

    def keep_recent(self, num_frames: int, rows: Sequence[int] | None = None) -> None:
        """Keep the sinks and the newest ``num_frames`` of the window, packed; in all rows unless told which."""
        for row in range(self.num_rows) if rows is None else rows:
            table = self.tables[row]
            window = table.with_role("window")
            kept = set(window[len(window) - num_frames :] if num_frames < len(window) else window)
            for slot, role in enumerate(table.roles):
                if role != "sink" and slot not in kept and table.frames[slot] is not None:
                    table.empty(slot)
            for src in sorted(kept):
                free = [s for s in range(src) if table.frames[s] is None and table.roles[s] != "sink"]
                if free:
                    self._move(row, src, free[0])

    def _move(self, row: int, src: int, dst: int) -> None:
        """Slot ``src`` becomes slot ``dst``, which must be empty."""
        table = self.tables[row]
        table.frames[dst], table.roles[dst] = table.frames[src], table.roles[src]
        if src in table.descriptors:
            table.descriptors[dst] = table.descriptors[src]
        table.empty(src)
        for layer in range(self.model.num_layers):
            self.layer_slots(layer, row).copy(src, dst)

    def pop_layer(self, layer: int) -> tuple[Any, list[Tensor]]:
        """Take a layer's storage out, to go on in another process: (plain values, tensors). Slot tables stay."""
        extra = {"scratch": self._scratch.pop(layer), "state": self._state.pop(layer)}
        tensors = [store.pop(layer) for store in (self.k, self.v, self._k_time)]
        self.model = replace(self.model, num_layers=self.model.num_layers - 1)
        plain = {"at": self._rotated_to.pop(layer)} | {k: [list(row) for row in rows] for k, rows in extra.items()}
        return plain, tensors + [x for rows in extra.values() for row in rows for x in row.values()]

    def insert_layer(self, layer: int, plain: Any, tensors: Sequence[Tensor]) -> None:
        """Put in, before layer ``layer``, what another cache of the same stream popped; its tables must be equal."""
        rest = iter(tensors)
        for store in (self.k, self.v, self._k_time):
            store.insert(layer, heads_first(next(rest)))
        self.model = replace(self.model, num_layers=self.model.num_layers + 1)
        self._rotated_to.insert(layer, plain["at"])
        for store, key in ((self._scratch, "scratch"), (self._state, "state")):
            store.insert(layer, [{name: next(rest) for name in names} for names in plain[key]])

    def describe(self, row: int = 0) -> list[dict[str, Any]]:
        """Filled slots as dicts (slot, role, frame, position), for pictures of the cache."""
        table = self.tables[row]
        at = self._rotated_to[-1][row] if self._rotated_to else [None] * len(table.frames)
        return [
            {"slot": s, "role": table.roles[s], "frame": f, "position": at[s]}
            for s, f in enumerate(table.frames)
            if f is not None
        ]


@dataclass(slots=True)
class LayerSlots:
    """One row's slots in one layer: what edits and readers of a policy work on.

    Tensors are views of the storage. A key is held twice in its temporal columns: rotated in ``k``, raw in ``k_time``.
    """

    layer: int
    model: ModelConfig
    k: Tensor
    """[slots, P, n, d], temporal columns rotated to ``at``."""
    v: Tensor
    """[slots, P, n, d]."""
    k_time: Tensor
    """[slots, P, n, t]: the temporal columns of ``k`` before rotation."""
    at: list[int | None]
    """Position each slot is rotated to; None: not rotated yet, or tokens of several positions."""
    scratch: dict[str, Tensor]
    """A policy's own tensors of this layer, [slots, …], kept between forwards; an entry moves with its slot."""
    state: dict[str, Tensor]
    """The same without that shape."""
    shared: dict[str, Tensor]
    """``state`` of layer 0, for what all layers share."""
    prompt: Any
    """The row's ``PromptContext``."""
    plan: RowPlan | None
    """What this forward does."""

    def raw_keys(self, slots: Sequence[int] | int) -> Tensor:
        """Keys without temporal rotation, [len(slots), P, n, d], a copy."""
        width = self.k_time.shape[-1]
        return torch.cat([self.k_time[slots], self.k[slots][..., width:]], dim=-1)

    def put(self, slot: int, k: Tensor, v: Tensor) -> None:
        """Fill a slot with raw keys and values [P, n, d]; it is rotated when next read."""
        width = self.k_time.shape[-1]
        self.k[slot, ..., width:], self.k_time[slot], self.v[slot] = k[..., width:], k[..., :width], v
        self.at[slot] = None

    def copy(self, src: int, dst: int) -> None:
        """Slot ``dst`` becomes a copy of ``src``."""
        for store in (self.k, self.v, self.k_time, *self.scratch.values()):
            store[dst].copy_(store[src])
        self.at[dst] = self.at[src]

    def turn(self, moves: Sequence[Move], given: Mapping[int | None, Tensor]) -> None:
        """Rotate slots to new positions, by the multipliers given for a move or else by new ones."""
        width = self.k_time.shape[-1]
        for first, last, positions in moves:
            self.at[first : last + 1] = positions
            turn = given.get(first)
            if turn is None:
                turn = temporal_rotation(positions, self.model.rope_columns, self.k.dtype, self.k.device)
            raw, keys = self.k_time[first : last + 1], self.k[first : last + 1]
            if raw.dtype == torch.bfloat16 and raw.device.type == "cpu" and native_kernels.is_ready():
                native_kernels.turn(raw, keys, turn)
            else:
                keys[..., :width] = rotate(raw, turn[:, None])

    def tokens(self, slots: Sequence[int] | None, num_visible: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N * P, n, d] of some slots; of the first ``num_visible`` without a copy."""
        if slots is None:
            return self.k[:num_visible].flatten(0, 1), self.v[:num_visible].flatten(0, 1)
        return self.k[list(slots)].flatten(0, 1), self.v[list(slots)].flatten(0, 1)


Move = tuple[int, int, tuple[int, ...]]
"""First and last slot of an unbroken run, and the new position of each."""


def _moves(at: Sequence[int | None], plan: RowPlan) -> list[Move]:
    """Slots that a plan wants read at another position than they are rotated to; None leaves a slot as it is."""
    slots = range(plan.num_visible) if plan.visible is None else plan.visible
    wanted = dict(zip(slots, plan.slot_positions, strict=True))
    moved = sorted(slot for slot, position in wanted.items() if position is not None and at[slot] != position)
    return [(first, last, tuple(wanted[s] for s in range(first, last + 1))) for first, last in _runs(moved)]


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of each unbroken run."""
    starts = [s for i, s in enumerate(slots) if i == 0 or slots[i - 1] != s - 1]
    ends = [s for i, s in enumerate(slots) if i == len(slots) - 1 or slots[i + 1] != s + 1]
    return list(zip(starts, ends, strict=True))


class CacheView:
    """One row of one forward: writes the chunk's keys and values, returns everything visible."""

    def __init__(self, cache: KVCache, row: int, plan: RowPlan, prompt: Any = None) -> None:
        self.cache, self.row, self.plan, self.prompt = cache, row, plan, prompt
        self.multipliers: dict[int | None, Tensor] = {}
        """Temporal multipliers to use in place of new ones: per first slot of a move, and None for the queries."""

    def moves(self) -> list[Move] | None:
        """What every layer will rotate; None where layers differ or more than writing and reading slots is planned."""
        plan, (at, *others) = self.plan, [layer[self.row] for layer in self.cache._rotated_to]
        if plan.visible is not None or plan.edits or plan.bias or plan.reader or any(other != at for other in others):
            return None
        written = {slot for slot, _ in plan.writes}
        return _moves([None if slot in written else position for slot, position in enumerate(at)], plan)

    def note(self, moves: Sequence[Move]) -> None:
        """All layers did these moves, by other means than ``read``."""
        for layer in self.cache._rotated_to:
            for slot, _ in self.plan.writes:
                layer[self.row][slot] = None
            for first, last, positions in moves:
                layer[self.row][first : last + 1] = positions

    def update(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Store the chunk and bring moved slots to their position.

        Args:
            k: [F * P, n, d], spatial RoPE applied, temporal RoPE not.
            v: [F * P, n, d].
            q: [F * P, n, d], fully rotated; only edits look at it.

        Returns:
            Visible keys (fully rotated) and values, each [N * P, n, d] (views of the storage, no copy, where the
            visible slots are the first ones).
        """
        return self._store(layer, k, v, q).tokens(self.plan.visible, self.plan.num_visible)

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Read]:
        """``update``, then what each group of heads attends to."""
        plan, slots = self.plan, self._store(layer, k, v, q)
        if plan.reader is not None:
            return plan.reader(slots, q)
        bias = None
        if plan.bias is not None:
            per_slot = torch.tensor(plan.bias, dtype=q.dtype).to(q.device, non_blocking=True)
            bias = per_slot.repeat_interleave(self.cache.tokens_per_frame)
        return [Read(*slots.tokens(plan.visible, plan.num_visible), bias)]

    def _store(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> LayerSlots:
        plan, slots = self.plan, self.cache.layer_slots(layer, self.row, self.prompt, self.plan)
        k_frames = k.unflatten(0, (-1, self.cache.tokens_per_frame))  # [F, P, n, d]
        v_frames = v.unflatten(0, (-1, self.cache.tokens_per_frame))
        if plan.edits:
            q_frames = None if q is None else q.unflatten(0, (-1, self.cache.tokens_per_frame))
            for edit in plan.edits:
                edit(slots, q_frames, k_frames, v_frames)
        for slot, j in plan.writes:
            slots.put(slot, k_frames[j], v_frames[j])
        slots.turn(_moves(slots.at, plan), self.multipliers)
        return slots

    def query_rotation(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Temporal multiplier [F, columns] of the chunk's queries."""
        if None in self.multipliers:
            return self.multipliers[None]
        return temporal_rotation(self.plan.query_positions, self.cache.model.rope_columns, dtype, device)
