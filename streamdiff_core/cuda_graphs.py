"""CUDA graphs: a forward that repeats is recorded and started as one launch instead of a thousand.

What differs from forward to forward of a steady stream are noisy latents, timesteps and the temporal rotations. They
are copied into memory of the recording, which is then replayed. The slot that is written is part of a recording:
a window of three slots is written in turn, so three recordings are a whole stream (SPEC §2). A forward is recorded
when it comes for the second time; whatever does not repeat (first chunks, other prompts, rows of several streams,
policies that edit or merge slots) runs as always. Off by default; not measured on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from streamdiff_core.attention import PromptContext
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.kv_cache import CacheView, KVCache, Move
from streamdiff_core.rope import spatial_rotation, temporal_rotation

MAX_GRAPHS = 32
"""Recordings kept per stream; the one not used for longest goes."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a function starts, without computing it: (replay, the tensor that each replay fills)."""


class CudaCapture:
    """``torch.cuda.graph``; all recordings share their working memory, since they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out


def record_forwards(transformer: CausalWanTransformer, capture: Capture | None = None) -> CausalWanTransformer:
    """Have ``transformer.forward`` record and replay what repeats, in place. Results stay the same.

    Raises:
        ValueError: no GPU.
    """
    if capture is None:
        if transformer.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, the model is on {transformer.device}; leave out --cuda-graphs")
        capture = CudaCapture()
    transformer.forward = RecordedForward(transformer.forward, capture)
    return transformer


@dataclass(slots=True)
class _Recording:
    """A forward in fixed memory."""

    replay: Callable[[], None]
    velocity: Tensor
    xt: Tensor
    timestep: Tensor
    multipliers: list[dict[int | None, Tensor]]
    """Per row, as ``CacheView.multipliers``."""
    kept: Any
    """What is read in place besides, so that its memory is not given away."""


class RecordedForward:
    """Stands in for ``CausalWanTransformer.forward``. The velocity it returns is overwritten by the next forward."""

    def __init__(self, forward: Callable[..., Tensor], capture: Capture) -> None:
        self._forward, self._capture = forward, capture
        self.recordings: WeakKeyDictionary[KVCache, OrderedDict[tuple, _Recording | None]] = WeakKeyDictionary()
        """Per stream; None: came once. No recording holds the cache, so they go when a stream ends."""

    def __call__(
        self, xt: Tensor, timestep: Tensor, prompts: Any, views: Sequence[CacheView] | None = None, **rest: Any
    ) -> Tensor:
        """As ``CausalWanTransformer.forward``."""
        moves = [view.moves() for view in views or ()]
        if not views or rest or None in moves or any(view.cache is not views[0].cache for view in views):
            return self._forward(xt, timestep, prompts, views, **rest)
        known = self.recordings.setdefault(views[0].cache, OrderedDict())
        key = _what_is_fixed(xt, prompts, views, moves)
        if key not in known:
            known[key] = None
            if len(known) > MAX_GRAPHS:
                known.popitem(last=False)
            return self._forward(xt, timestep, prompts, views)
        known.move_to_end(key)
        if known[key] is None:
            known[key] = self._record(xt, timestep, prompts, views, moves)
        recording = known[key]
        recording.xt.copy_(xt)
        recording.timestep.copy_(timestep, non_blocking=True)
        for view, row_moves, held in zip(views, moves, recording.multipliers, strict=True):
            for name, multiplier in _multipliers(view, row_moves).items():
                held[name].copy_(multiplier)
            view.note(row_moves)
        recording.replay()
        return recording.velocity

    def _record(
        self, xt: Tensor, timestep: Tensor, prompts: Any, views: Sequence[CacheView], moves: Sequence[list[Move]]
    ) -> _Recording:
        xt, timestep, model = xt.clone(), timestep.clone(), views[0].cache.model
        for view, row_moves in zip(views, moves, strict=True):
            view.multipliers = {name: x.clone() for name, x in _multipliers(view, row_moves).items()}
        (_, ph, pw), like = model.patch_size, views[0].cache.k[0]
        spatial = spatial_rotation(
            xt.shape[-2] // ph, xt.shape[-1] // pw, model.rope_columns, like.dtype, like.device
        )  # fmt: skip
        replay, velocity = self._capture(lambda: self._forward(xt, timestep, prompts, views))
        return _Recording(replay, velocity, xt, timestep, [view.multipliers for view in views], (prompts, spatial))


def _what_is_fixed(xt: Tensor, prompts: Any, views: Sequence[CacheView], moves: Sequence[list[Move]]) -> tuple:
    """All that a replay cannot change."""
    contexts = [prompts] if isinstance(prompts, PromptContext) else prompts
    rows = tuple(
        (view.row, view.plan.writes, view.plan.num_visible, tuple((first, last) for first, last, _ in row_moves))
        for view, row_moves in zip(views, moves, strict=True)
    )
    return xt.shape, xt.dtype, rows, tuple(map(id, contexts))


def _multipliers(view: CacheView, moves: Sequence[Move]) -> dict[int | None, Tensor]:
    """Temporal rotations of one row in this forward."""
    like, columns = view.cache.k[0], view.cache.model.rope_columns
    spans = {None: view.plan.query_positions} | {first: positions for first, _, positions in moves}
    return {name: temporal_rotation(span, columns, like.dtype, like.device) for name, span in spans.items()}
