"""A bank of past frames from which each layer fetches the few that matter now (SEEDS §3.10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamdiff_core.kv_cache import LayerSlots
from streamdiff_core.kv_policies._edits import describe_written, raw_query_sum
from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy, held_frames
from streamdiff_core.rope import rotate, temporal_rotation
from streamdiff_core.types import Edit, Read, RowPlan, SlotTable


@policy("frame_routing")
@dataclass(frozen=True)
class FrameRoutingPolicy(RollingPolicy):
    """Frames that leave the window go to a bank; every forward reads the best ``read_frames`` of it.

    A frame's score is its mean key times the mean query of the chunk (``score="query"``, CausalCine) or times the mean
    text key of the prompt (``score="text"``, MemFlow and IAMFlow). Each layer chooses for itself, on the device. What
    it reads sits between sinks and window.

    Paper: CausalCine's CAMR; MemFlow; IAMFlow's frame bank (SEEDS §3.10).
    Training-free: runs, CausalCine's and MemFlow's models were trained with it.
    Cost: ``bank_frames`` more slots, of which ``read_frames`` are gathered, rotated and read per layer and forward.
    Look for: a scene that returns as it was.
    Deviates: the bank is bounded (CAMR keeps everything) and first in, first out; MemFlow's bank keeps its best frames
        by text score, IAMFlow's language-model scoring of entities is left out; scores ignore temporal rotation.
    """

    bank_frames: int = 12
    """Slots of the bank."""
    read_frames: int = 3
    """Frames read from the bank; 0 reads none (CausalCine 5, MemFlow and IAMFlow 3)."""
    score: str = "query"
    """``query`` or ``text``."""
    per_head: bool = False
    """Whether each head chooses for itself, as in MemFlow."""
    every_chunks: int = 1
    """Bank only the first frame of every so many chunks (MemFlow 3); 1 banks every frame."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank_frames < 1 or self.every_chunks < 1 or not 0 <= self.read_frames <= self.bank_frames:
            raise ValueError(
                f"frame_routing needs bank_frames >= 1, every_chunks >= 1 and 0 <= read_frames <= bank_frames, got "
                f"{self.bank_frames}, {self.every_chunks} and {self.read_frames}"
            )
        if self.score not in ("query", "text"):
            raise ValueError(f"score must be 'query' or 'text', got {self.score!r}")
        self._use(positions="packed")

    @property
    def extra_slots(self) -> int:
        """The bank."""
        return self.bank_frames

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """After a ``recache`` switch what is read as it is; the bank stays."""
        return [held_frames(table, without=("bank",))] if switch == "recache" else []

    def _admit(self, table: SlotTable, frame_ids: Sequence[int], descriptor: object, edits: list[Edit]) -> None:
        count = table.notes.get("num_chunks", 0)
        table.notes["num_chunks"] = count + 1
        if self.every_chunks > 1 and count % self.every_chunks == 0:
            wanted = {f for f in table.notes.get("wanted", ()) if table.slots_of(f)}
            table.notes["wanted"] = frozenset(wanted | {frame_ids[0]})
        super()._admit(table, frame_ids, descriptor, edits)

    def _retire(self, table: SlotTable, slot: int, edits: list[Edit]) -> None:
        is_wanted = self.every_chunks == 1 or table.frames[slot] in table.notes.get("wanted", ())
        if not is_wanted or self.read_frames == 0:
            table.empty(slot)
            return
        bank = table.with_role("bank")
        if len(bank) == self.bank_frames:
            table.empty(bank[0])
        table.roles[slot] = "bank"

    def _visible(self, table: SlotTable, frame_ids: Sequence[int]) -> list[int]:
        return [s for s in super()._visible(table, frame_ids) if table.roles[s] != "bank"]

    def _map(self, table: SlotTable, pinned: list[int], window: list[int]) -> dict[int, int | None]:
        """As packed, with room for what is fetched between sinks and window."""
        room = len(pinned) + min(self.read_frames, len(table.with_role("bank")))
        return {s: i for i, s in enumerate(pinned)} | {s: room + i for i, s in enumerate(window)}

    def _extend(self, plan: RowPlan, table: SlotTable, frame_ids: Sequence[int]) -> RowPlan:
        plan = plan.adding(describe_written)
        bank = tuple(table.with_role("bank"))
        count = min(self.read_frames, len(bank))
        if count == 0:
            return plan
        start = len(table.with_role("sink"))
        return replace(plan, reader=FetchFrames(bank, tuple(range(start, start + count)), self.score, self.per_head))


@dataclass(frozen=True)
class FetchFrames:
    """Reads the visible slots and, at ``positions``, the best of the ``bank``, oldest first."""

    bank: tuple[int, ...]
    positions: tuple[int, ...]
    score: str
    per_head: bool

    def __call__(self, slots: LayerSlots, q: Tensor) -> list[Read]:
        """Run in one layer; q [F * P, n, d]."""
        tokens = slots.k.shape[1]
        keys, values = slots.tokens(slots.plan.visible, slots.plan.num_visible)
        if self.score == "text":
            asking = slots.prompt.keys[slots.layer][0].mean(0)  # [n, d]
        else:
            asking = raw_query_sum(slots, q.unflatten(0, (-1, tokens))).mean(0) / tokens
        best = self.choose(slots.scratch["mean_key"][list(self.bank)], asking)  # [count, n]
        heads = torch.arange(q.shape[1], device=q.device)
        bank_keys, bank_values = slots.raw_keys(list(self.bank)), slots.v[list(self.bank)]  # [b, P, n, d]
        fetched = bank_keys[best, :, heads].transpose(1, 2)  # [count, P, n, d]
        turn = temporal_rotation(self.positions, slots.model.rope_columns, q.dtype, q.device)
        fetched = rotate(fetched, turn[:, None])
        fetched_values = bank_values[best, :, heads].transpose(1, 2)
        return [Read(torch.cat([fetched.flatten(0, 1), keys]), torch.cat([fetched_values.flatten(0, 1), values]))]

    def choose(self, described: Tensor, asking: Tensor) -> Tensor:
        """Bank entries to fetch, per head and in the order of the bank: [b, n, d] and [n, d] -> [count, n]."""
        score = torch.einsum("bnd,nd->bn", described, asking)
        if not self.per_head:
            score = score.sum(1, keepdim=True).expand(-1, described.shape[1])
        return score.topk(len(self.positions), dim=0).indices.sort(dim=0).values
