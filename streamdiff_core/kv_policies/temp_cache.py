"""TempCache: tokens that do not change over time are kept once, with a count (SEEDS §3.14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy
from streamdiff_core.types import TOKENS, Edit, Read, RowPlan, SlotTable


@policy("temp_cache")
@dataclass(frozen=True)
class TempCachePolicy(RollingPolicy):
    """Tokens of a frame that leaves the window merge with their like in the next frame; the rest go to a memory.

    Per layer, head and place: if the keys have a cosine of at least ``threshold``, one token remains with the newer
    key, the mean value of the group and ``log(group size)`` added to its logits. The memory keeps the newest tokens
    that found no match, so in a quiet scene it reaches back much further than its number of slots.

    Paper: TempCache (SEEDS §3.14; no official code).
    Training-free: yes.
    Cost: ``memory_frames`` more slots to read, attention with a mask, one gather of the memory per evicted frame.
    Look for: nothing on a short window but the history it reaches; memory that does not grow.
    Deviates: the match is sought at the same place only (the paper: approximate nearest neighbours); frames merge when
        they leave the window, not at once; the memory is bounded; AnnCA and AnnSA are left out.
    """

    memory_frames: int = 3
    """Slots for tokens without a match."""
    threshold: float = 0.9
    """Cosine of two keys from which they merge; above 1 nothing merges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_frames < 1:
            raise ValueError(f"memory_frames must be at least 1, got {self.memory_frames}")
        self._use(positions="absolute")

    @property
    def extra_slots(self) -> int:
        """The memory."""
        return self.memory_frames

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        memory, window = table.with_role("memory"), table.with_role("window")
        free = [s for s, f in enumerate(table.frames) if f is None]
        fresh = free[len(free) - (self.memory_frames - len(memory)) :]
        for s in fresh:
            table.frames[s], table.roles[s] = TOKENS, "memory"
        following = [s for s in window if table.frames[s] == table.frames[slot] + 1]
        edits.append(Merge(slot, following[0] if following else None, (*memory, *fresh), tuple(fresh), self.threshold))
        table.empty(slot)

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        at = super()._map(table, pinned, window)
        return {s: None if table.frames[s] == TOKENS else p for s, p in at.items()}

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        has_memory = any(p is None for p in plan.slot_positions)
        return replace(plan.adding(count_written), reader=read_counted) if has_memory else plan


@dataclass(frozen=True)
class Merge:
    """Slot ``src`` leaves: tokens with a like in ``into`` join it, the others replace the oldest of ``memory``."""

    src: int
    into: int | None
    memory: tuple[int, ...]
    fresh: tuple[int, ...]
    """Slots of the memory that hold nothing yet."""
    threshold: float

    def __call__(self, slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Run in one layer."""
        wide = torch.promote_types(slots.k.dtype, torch.float32)  # bfloat16 cannot count beyond 256
        count = slots.scratch.setdefault("count", torch.ones_like(slots.k[..., 0], dtype=wide))
        count[list(self.fresh)] = 0
        alone = torch.ones_like(count[self.src], dtype=torch.bool)
        if self.into is not None:
            like = torch.cosine_similarity(*(slots.raw_keys(s) for s in (self.src, self.into)), dim=-1)
            alone = like < self.threshold
            both = count[self.src] + count[self.into]
            share = (count[self.src] / both).to(slots.v.dtype)[..., None]
            mean = slots.v[self.into].lerp(slots.v[self.src], share)
            slots.v[self.into] = torch.where(alone[..., None], slots.v[self.into], mean)
            count[self.into] = torch.where(alone, count[self.into], both)
        places = [*self.memory, self.src]
        size = len(self.memory) * slots.k.shape[1]
        weight = torch.cat([count[list(self.memory)].flatten(0, 1), count[self.src] * alone])  # [N, n], 0: no token
        age = torch.arange(len(weight), device=weight.device)[:, None]
        newest = (
            torch.where(weight > 0, age, age - len(weight)).topk(size, dim=0).indices.sort(dim=0).values
        )  # [size, n]
        for store in (slots.k, slots.v, slots.k_time):
            tokens = store[places].flatten(0, 1)  # [N, n, .]
            kept = tokens.gather(0, newest[..., None].expand(-1, -1, tokens.shape[-1]))
            store[list(self.memory)] = kept.unflatten(0, (len(self.memory), -1))
        count[list(self.memory)] = weight.gather(0, newest).unflatten(0, (len(self.memory), -1))


def count_written(slots: LayerSlots, q: Tensor, k: Tensor, v: Tensor) -> None:
    """A token that is written stands for itself; ``scratch["count"]`` [slots, P, n], 0 where there is no token."""
    for slot, _ in slots.plan.writes:
        slots.scratch["count"][slot] = 1


def read_counted(slots: LayerSlots, q: Tensor) -> list[Read]:
    """The visible slots, with ``log(count)`` on the logits of each token."""
    keys, values = slots.tokens(slots.plan.visible, slots.plan.num_visible)
    visible = list(range(slots.plan.num_visible) if slots.plan.visible is None else slots.plan.visible)
    bias = slots.scratch["count"][visible].flatten(0, 1).log()  # [N, n]
    return [Read(keys, values, bias.T[:, None])]
