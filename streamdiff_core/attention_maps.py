"""Where a stream's newest chunk looks: attention probabilities of chosen layers, computed on request.

The stream's own attention is fused and never holds its probabilities. Here the newest chunk's forward is run once more
on a copy of its cache row, through a view that writes down what each layer reads; nothing of the stream changes and
nothing of it is slower. The sink column that StreamDiffusionV2 relies on (paper §3.2) can be seen in these maps.

Shapes: L query tokens, P tokens per latent frame, N visible latent frames, n heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff_core.kv_cache import CacheView, KVCache
from streamdiff_core.session import StreamSession
from streamdiff_core.types import Read


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMap:
    """Attention of one chunk in one layer, and what the keys are."""

    probs: Tensor
    """[n, L, N * P] float32, rows sum to 1."""
    frames: tuple[int, ...]
    """Latent frame in each visible slot; key tokens come in this order."""
    roles: tuple[str, ...]
    """Role of each visible slot."""
    query_frames: tuple[int, ...]
    """Latent frames of the chunk."""
    tokens_per_frame: int
    """P."""

    @property
    def per_frame(self) -> Tensor:
        """Share of attention on each visible latent frame, mean over query tokens [n, N]; rows sum to 1."""
        return self.probs.mean(1).unflatten(1, (len(self.frames), -1)).sum(2)

    def share(self, role: str) -> float:
        """Share of attention, mean over heads and queries, on ``query`` (the chunk itself) or on the other latent
        frames of a role; 0 if there is none."""
        wanted = [
            role == ("query" if frame in self.query_frames else kept_as)
            for frame, kept_as in zip(self.frames, self.roles, strict=True)
        ]
        return self.per_frame.mean(0)[torch.tensor(wanted)].sum().item()


class _WatchedView(CacheView):
    """A cache view that keeps the attention probabilities of some layers."""

    def watch(self, layers: Sequence[int]) -> _WatchedView:
        """Keep those of these layers from now on, ``probs`` [n, L, N] by layer."""
        self.probs: dict[int, Tensor] = {}
        self._layers = layers
        return self

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Read]:
        """As ``CacheView.read``; q [L, n, d]."""
        reads = super().read(layer, q, k, v)
        if layer in self._layers:
            (read,) = reads
            logits = torch.einsum("lnd,mnd->nlm", q.float(), read.keys.float()) * q.shape[-1] ** -0.5
            self.probs[layer] = (logits if read.bias is None else logits + read.bias).softmax(-1)
        return reads


@torch.inference_mode()
def attention_maps(
    session: StreamSession, layers: Sequence[int] | None = None, cache_row: int = -1
) -> dict[int, AttentionMap]:
    """Attention of the newest chunk that a cache row holds.

    Args:
        session: a stream with at least one chunk behind it; it is left as it is.
        layers: which; default all. Memory is ``n * L * N * P`` floats a layer.
        cache_row: row of the cache; the default is the one that finished chunks leave through.

    Raises:
        ValueError: nothing pushed yet, or a KV policy whose heads read different keys.
    """
    cache, transformer = session.cache, session.pipe.transformer
    row_op = session.newest_row(cache_row)
    copy = KVCache(
        cache.model, cache.policy, num_rows=1, tokens_per_frame=cache.tokens_per_frame,
        dtype=transformer.dtype, device=transformer.device,
    )  # fmt: skip
    copy.take_over(cache, row_op.cache_row)
    table = copy.tables[0]
    plan = copy.policy.plan(table, row_op.frame_ids)
    if plan.reader is not None or plan.edits:
        raise ValueError(f"policy {session.options.policy!r} reads keys of its own making; watch policy='sink'")
    view = _WatchedView(copy, 0, plan, row_op.prompt)
    view.watch(range(cache.model.num_layers) if layers is None else layers)
    transformer(row_op.xt[None], torch.tensor([row_op.timestep]), row_op.prompt, [view])
    visible = range(plan.num_visible) if plan.visible is None else plan.visible
    return {
        layer: AttentionMap(
            probs=probs.cpu(),
            frames=tuple(table.frames[slot] for slot in visible),
            roles=tuple(table.roles[slot] for slot in visible),
            query_frames=row_op.frame_ids,
            tokens_per_frame=cache.tokens_per_frame,
        )
        for layer, probs in view.probs.items()
    }
