"""Two ways to look at a policy without a model: what a row sees, in words, and what its attention returns.

``seen`` plays chunks into a table and writes what each forward reads, sorted by position: ``s0@0 w4@1 w5@2`` is the
sink of frame 0 at position 0 and the window's frames 4 and 5 behind it (``*`` stands for tokens of several frames).
``Feed`` and ``run`` put random raw queries, keys and values through the real cache; ``twin`` is attention spelt out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streamdiff_core.attention import attend_reads
from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import make_policy
from streamdiff_core.rope import rotate
from streamdiff_core.types import RowPlan, SlotTable

MODEL = ModelConfig(dim=24, ffn_dim=8, num_heads=2, num_layers=3)  # heads of 12: 2 + 2 + 2 RoPE columns
TOKENS, HEADS, HEAD_DIM = 6, 2, 12
CLOSE = dict(rtol=0, atol=1e-10)  # float64; sums in another order


def policy_of(name: str, sink: int, window: int, positions: str = "packed", **knobs):
    return make_policy(name, CacheConfig(sink_frames=sink, window_frames=window, positions=positions), knobs)


def words(table: SlotTable, plan: RowPlan) -> str:
    """What a plan reads, sorted by position."""
    slots = range(plan.num_visible) if plan.visible is None else plan.visible
    read = sorted(zip(plan.slot_positions, slots, strict=True), key=lambda x: (x[0] is None, x[0], x[1]))
    names = [(table.roles[s][0], "*" if table.frames[s] < 0 else table.frames[s], p) for p, s in read]
    return " ".join(f"{role}{frame}" if p is None else f"{role}{frame}@{p}" for role, frame, p in names)


def seen(policy, chunks: Sequence[tuple[int, ...]], switches: dict[int, str] | None = None) -> list[str]:
    """What each chunk reads; ``switches`` names the prompt switch that comes with a first frame."""
    table, lines = policy.new_table(), []
    for chunk in chunks:
        policy.before_chunk(table, (switches or {}).get(chunk[0]))
        plan = policy.plan(table, chunk)
        assert policy.plan(table, chunk).writes == plan.writes, "a later step must not move anything"
        query = [plan.slot_positions[_index(plan, table.slots_of(f)[-1])] for f in chunk]
        assert list(plan.query_positions) == query, "queries sit where their keys do"
        lines.append(words(table, plan))
    return lines


def _index(plan: RowPlan, slot: int) -> int:
    return slot if plan.visible is None else plan.visible.index(slot)


def singles(first: int, last: int) -> list[tuple[int, ...]]:
    """Chunks of one frame."""
    return [(f,) for f in range(first, last + 1)]


class Feed:
    """Raw queries, keys and values of every frame and layer, [TOKENS, HEADS, HEAD_DIM] each, made on demand."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.made = seed, {}

    def __call__(self, what: str, frame: int, layer: int) -> Tensor:
        key = ("qkv".index(what), frame, layer)
        if key not in self.made:
            generator = torch.Generator().manual_seed(self.seed + 1_000_000 * key[0] + 1_000 * layer + frame)
            self.made[key] = torch.randn(TOKENS, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
        return self.made[key]


def new_cache(policy, num_rows: int = 1) -> KVCache:
    return KVCache(MODEL, policy, num_rows=num_rows, tokens_per_frame=TOKENS, dtype=torch.float64)


def run(policy, chunks, feed, *, switches=None, steps=1, prompt=None, cache=None, row=0) -> list[list[Tensor]]:
    """Attention output [F * TOKENS, HEADS * HEAD_DIM] per chunk and layer, of the last step."""
    cache, outputs = cache or new_cache(policy), []
    for chunk in chunks:
        policy.before_chunk(cache.tables[row], (switches or {}).get(chunk[0]))
        for _ in range(steps):
            view, layers = cache.begin(row, chunk, prompt=prompt), []
            turn = view.query_rotation(torch.float64, torch.device("cpu"))[:, None]
            for layer in range(MODEL.num_layers):
                q, k, v = (torch.stack([feed(what, f, layer) for f in chunk]) for what in "qkv")
                reads = view.read(layer, rotate(q, turn).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
                layers.append(attend_reads(rotate(q, turn).flatten(0, 1)[None], reads)[0])
        outputs.append(layers)
    return outputs


def turned(x: Tensor, position: float) -> Tensor:
    """Temporal RoPE by cosine and sine: pairs 0 and 1 of the last dimension turn by p and p / 100."""
    out = x.clone()
    for i, angle in enumerate((position, position / 100)):
        a, b = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[..., 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def twin(queries: Sequence[Tensor], positions: Sequence[int], memory: Sequence[tuple]) -> Tensor:
    """Attention, spelt out: raw queries of each frame at its position, against (key, value, position, weight).

    A weight multiplies the softmax mass of its tokens: a number, or [TOKENS, HEADS].
    """
    q = torch.cat([turned(x, p) for x, p in zip(queries, positions, strict=True)])
    keys = torch.cat([turned(k, p) for k, _, p, _ in memory])
    values = torch.cat([v for _, v, _, _ in memory])
    weight = torch.cat([torch.as_tensor(w, dtype=torch.float64).expand(k.shape[:2]) for k, _, _, w in memory])
    mass = (torch.einsum("lnd,tnd->nlt", q, keys) / math.sqrt(HEAD_DIM)).exp() * weight.T[:, None]
    return torch.einsum("nlt,tnd->lnd", mass / mass.sum(-1, keepdim=True), values).flatten(1)
