"""One stage: some layers of the transformer, their part of every stream's cache, and moving layers elsewhere.

A stage holds the weights of its layers and nothing else: the first one adds the embeddings, the last one the head.
(Upstream loads the whole model on every rank, SPEC §6.1.) All stages replay the same cache decisions, which are
integers, in the same order; so a layer that moves takes its weights, keys, values and rotations along and finds the
slot table already there. Upstream forgets the order of eviction when it moves a layer (SPEC §6.4).

Shapes: B rows, F latent frames, P tokens per frame, D width.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamdiff_core.attention import PromptContext
from streamdiff_core.config import CacheConfig
from streamdiff_core.dit import Block, CausalWanTransformer, Tokens
from streamdiff_core.flow import x0_from_velocity
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import make_policy
from streamdiff_core.memory_need import PROMPT_BYTES
from streamdiff_core.parallel.block_scheduler import RankTimes, Split, layer_ranges, moves
from streamdiff_core.parallel.links import Links
from streamdiff_core.timing import StageTimer
from streamdiff_core.types import StreamingVAE


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What every rank has to know of a batch before its numbers arrive; plain values."""

    shape: tuple[int, ...]
    """Of the noisy latents [B, F, C, h, w]."""
    dtype: str
    """Their number type."""
    timesteps: tuple[tuple[float, ...], ...]
    """Per row and latent frame."""
    sigmas: tuple[float | tuple[float, ...], ...]
    """Per row, or per row and latent frame."""
    caches: tuple[int, ...]
    """Number of each row's cache."""
    cache_rows: tuple[int, ...]
    frame_ids: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]
    """Number of each row's prompt."""
    descriptors: tuple[list[float] | None, ...]
    streams: tuple[int | None, ...]
    """Stream whose decoder takes this row, None while it has steps to go."""
    chunk_idx: int
    """Newest chunk in it, for traces."""
    wants_x0: bool = True
    """False: only the caches are to change."""

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> MicroBatch:
        """Inverse of ``asdict`` after JSON, which turns tuples into lists."""
        return cls(**{name: _tuples(x) if name != "descriptors" else tuple(x) for name, x in value.items()})

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class StagePart:
    """Which part of a transformer a stage holds: its layers, on the first rank the embeddings, on the last the head."""

    layers: range
    is_first: bool
    is_last: bool

    @classmethod
    def of(cls, split: Split, rank: int) -> StagePart:
        """The part of a rank under a split."""
        return cls(layer_ranges(split)[rank], rank == 0, rank == len(split) - 1)

    def covers(self, name: str) -> bool:
        """Whether a tensor of the whole model's state dict is in this part."""
        top, _, rest = name.partition(".")
        if top == "blocks":
            return int(rest.partition(".")[0]) in self.layers
        return self.is_last if top == "head" else self.is_first if top in EMBEDDINGS else True

    def keep(self, transformer: CausalWanTransformer) -> CausalWanTransformer:
        """Drop the rest from a transformer, which may be on the meta device."""
        transformer.blocks = nn.ModuleList(transformer.blocks[i] for i in self.layers)
        for name in EMBEDDINGS if not self.is_first else ():
            setattr(transformer, name, None)
        if not self.is_last:
            transformer.head = None
        return transformer


EMBEDDINGS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection")


class Stage:
    """Layers ``split[rank]`` of a transformer of which ``StagePart`` has kept this rank's part."""

    def __init__(
        self,
        transformer: CausalWanTransformer,
        split: Split,
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        vae: StreamingVAE | None = None,
    ) -> None:
        """``vae`` is needed on the last rank, which decodes."""
        self.transformer, self.config, self.vae = transformer, transformer.config, vae
        self.split, self.rank, self.dtype, self.device = tuple(split), rank, dtype, torch.device(device)
        self.is_first, self.is_last = rank == 0, rank == len(split) - 1
        self.layers = list(layer_ranges(split)[rank])
        self.caches: dict[int, KVCache] = {}
        self.timer, self.origin_s = StageTimer(self.device), time.perf_counter()
        self._decoders: dict[int, Any] = {}
        self._embedded: dict[int, Tensor] = {}
        self._contexts: dict[int, PromptContext] = {}
        self.moved_ms = [0.0]

    @property
    def nbytes(self) -> int:
        """Bytes of weights and caches."""
        tensors = [*self.transformer.parameters(), *self.transformer.buffers()]
        return sum(x.numel() * x.element_size() for x in tensors) + sum(c.nbytes for c in self.caches.values())

    # --- one micro-batch ------------------------------------------------------------------------------------------

    def message_size(self, batch: MicroBatch) -> int:
        """Numbers in what this batch looks like between two stages."""
        b, f = batch.shape[:2]
        return b * f * (math.prod(self._grid(batch)) + 7) * self.config.dim

    def run(self, batch: MicroBatch, arrived: Tensor | None, xt: Tensor | None) -> Tensor | None:
        """This stage's part of a forward.

        Args:
            batch: what it is.
            arrived: message of the stage before [N]; None on the first.
            xt: noisy latents [B, F, C, h, w]; first and last stage.

        Returns:
            Message for the next stage [N]; on the last stage x0 [B, F, C, h, w], or None if nobody wants it.
        """
        prompts = [self._context(slot) for slot in batch.prompts]
        self._forget_contexts(batch.prompts)
        rows = zip(batch.caches, batch.cache_rows, batch.frame_ids, batch.descriptors, prompts, strict=True)
        timestep = torch.tensor(
            batch.timesteps,
            dtype=torch.float64 if batch.dtype == "float64" else torch.float32,
            device=self.device,
        )
        if self.is_first:
            with self.timer.stage("embed", batch.chunk_idx):
                tokens = self.transformer.embed(xt, timestep)
        else:
            tokens = self._unpack(batch, arrived)
        with self.timer.stage("layers", batch.chunk_idx):
            views = [
                self.caches[cache].begin(row, frames, None if d is None else np.asarray(d, np.float32), prompt)
                for cache, row, frames, d, prompt in rows
            ]
            if self.layers:
                tokens = self.transformer.run_blocks(tokens, self._grid(batch), prompts, views)
        if not self.is_last:
            return torch.cat([tokens.x.reshape(-1), tokens.time.reshape(-1), tokens.time6.reshape(-1)])
        if not batch.wants_x0:
            return None
        with self.timer.stage("head", batch.chunk_idx):
            velocity = self.transformer.predict(tokens, xt, timestep)
            levels = [torch.tensor(s, dtype=torch.float64) if isinstance(s, tuple) else s for s in batch.sigmas]
            x0s = [x0_from_velocity(x, v, level) for x, v, level in zip(xt, velocity, levels, strict=True)]
            return torch.stack(x0s)

    def decode(self, stream: int, latents: Tensor, chunk_idx: int) -> Tensor:
        """Latents [F, C, h, w] of a stream's next finished chunk -> pixels [T, 3, H, W] in the latents' number type."""
        with self.timer.stage("decode", chunk_idx):
            return self.vae.decode(latents[None], self._decoders[stream])[0].to(latents.dtype)

    def _grid(self, batch: MicroBatch) -> tuple[int, int]:
        _, ph, pw = self.config.patch_size
        return batch.shape[-2] // ph, batch.shape[-1] // pw

    def _unpack(self, batch: MicroBatch, message: Tensor) -> Tokens:
        """Contiguous views of a message, so that the next layers round as they would in one process."""
        b, f = batch.shape[:2]
        d, p = self.config.dim, math.prod(self._grid(batch))
        x, time, time6 = message.split([b * f * p * d, b * f * d, b * f * 6 * d])
        return Tokens(x.view(b, f, p, d), time.view(b, f, d), time6.view(b, f, 6, d))

    # --- state that commands change -------------------------------------------------------------------------------

    def set_prompt(self, slot: int, embedded: Tensor) -> None:
        """Embedded prompt [1, text_len, D] under a number; keys and values of these layers follow when needed."""
        self._embedded[slot] = embedded
        self._contexts.pop(slot, None)

    def _context(self, slot: int) -> PromptContext:
        if slot not in self._contexts:
            pairs = [block.cross_attn.project_prompt(self._embedded[slot]) for block in self.transformer.blocks]
            self._contexts[slot] = PromptContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))
        return self._contexts[slot]

    def _forget_contexts(self, used: Sequence[int]) -> None:
        """Make room: what was projected first goes first, and is projected again should it be needed."""
        most = PROMPT_BYTES // max(1, self._contexts[used[0]].nbytes)
        for slot in [s for s in self._contexts if s not in used][: max(0, len(self._contexts) - most)]:
            del self._contexts[slot]

    def new_cache(
        self, number: int, policy: str, config: dict[str, Any], options: dict[str, Any], num_rows: int, tokens: int
    ) -> None:
        """A stream's cache for these layers, under a number; ``tokens`` per latent frame."""
        rules = make_policy(policy, CacheConfig(**{name: _tuples(x) for name, x in config.items()}), options)
        model = replace(self.config, num_layers=len(self.layers))
        self.caches[number] = KVCache(
            model, rules, num_rows=num_rows, tokens_per_frame=tokens, dtype=self.dtype, device=self.device
        )

    def call_cache(self, number: int, method: str, arguments: Sequence[Any]) -> None:
        """``fork``, ``clear``, ``keep_recent``, ``take_over``: what a stream does to its cache between two forwards."""
        caches = [self.caches[x["cache"]] if isinstance(x, dict) else x for x in arguments]
        getattr(self.caches[number], method)(*caches)

    def drop_cache(self, number: int) -> None:
        """Free a closed stream's cache."""
        self.caches.pop(number, None)

    def open_decoder(self, stream: int) -> None:
        """Fresh VAE memory for a stream (last stage)."""
        if self.is_last:
            self._decoders[stream] = self.vae.new_state()

    def close_decoder(self, stream: int) -> None:
        """Free it."""
        self._decoders.pop(stream, None)

    # --- layers on the move ---------------------------------------------------------------------------------------

    def move_layers(self, split: Split, links: Links) -> None:
        """Give and take layers until this rank holds its part of ``split``; every rank does so at the same batch."""
        for layer, giver, taker in moves(self.split, split):
            if giver == self.rank:
                self._give(layer, taker, links)
            elif taker == self.rank:
                self._take(layer, giver, links)
        self.split = tuple(split)
        self._contexts.clear()
        self.moved_ms.append(max((e.end_ms for e in self.timer.trace()), default=0.0))

    def _give(self, layer: int, taker: int, links: Links) -> None:
        at = self.layers.index(layer)
        block = self.transformer.blocks[at]
        states = {number: cache.pop_layer(at) for number, cache in self.caches.items()}
        info = {
            "fused": block.self_attn._fused is not None,
            "caches": [[number, info] for number, (info, _) in states.items()],
            "shapes": [[[list(x.shape), str(x.dtype)[6:]] for x in tensors] for _, tensors in states.values()],
        }
        links.send_json("layer_info", info, taker)
        for tensor in (*block.state_dict().values(), *(x for _, tensors in states.values() for x in tensors)):
            links.send("layers", tensor, taker)
        del self.layers[at], self.transformer.blocks[at]

    def _take(self, layer: int, giver: int, links: Links) -> None:
        info = links.recv_json("layer_info", giver)
        with torch.device("meta"):
            block = Block(self.config).to(self.dtype)
        state = block.state_dict()
        weights = {k: links.recv("layers", tuple(x.shape), x.dtype, giver).open() for k, x in state.items()}
        block.load_state_dict(weights, assign=True)
        block.eval().requires_grad_(False)
        if info["fused"]:
            block.self_attn.fuse()
        at = bisect.bisect(self.layers, layer)
        for (number, plain), shapes in zip(info["caches"], info["shapes"], strict=True):
            tensors = [links.recv("layers", tuple(s), getattr(torch, dtype), giver).open() for s, dtype in shapes]
            self.caches[number].insert_layer(at, plain, tensors)
        self.layers.insert(at, layer)
        self.transformer.blocks.insert(at, block)

    # --- what it costs --------------------------------------------------------------------------------------------

    def times(self) -> RankTimes | None:
        """Median cost since the layers last moved; None before anything ran, NaN per layer without layers."""
        events = [e for e in self.timer.trace() if e.start_ms >= self.moved_ms[-1]]
        spent: dict[str, list[float]] = {}
        for e in events:
            spent.setdefault(e.stage, []).append(e.end_ms - e.start_ms)
        runs = spent.get("layers", [])
        if not runs:
            return None
        own = FIRST * self.is_first + LAST * self.is_last
        fixed = sum(statistics.median(spent[s]) * len(spent[s]) for s in own if s in spent) / len(runs)
        layer_ms = statistics.median(runs) / len(self.layers) if self.layers else math.nan
        return RankTimes(layer_ms=layer_ms, fixed_ms=fixed)


FIRST, LAST = ("border", "encode", "embed"), ("head", "decode")
"""Timed work that stays on its rank whatever the split."""
