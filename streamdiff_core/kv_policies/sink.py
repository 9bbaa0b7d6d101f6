"""Sink + rolling window: the cache of StreamDiffusionV2 (paper §3.2, SPEC §2, SEEDS §3.1-3.2).

The first ``sink_frames`` latent frames of the stream stay; the last ``window_frames`` roll. Slots fill in
order and the oldest non-sink slot is then overwritten in place (a ring: no memory moves). Optionally a stale
sink is refreshed when the content has changed.

Where this differs from the released code, on purpose (SPEC §2.3, §2.6, §2.8): ``sink_frames`` is honoured for
every value; later denoising steps of a chunk never evict; the sink decision is taken once per chunk for all
layers, from a descriptor of the clean source latents instead of rotated keys; empty slots are never compared;
the table belongs to the stream, so nothing leaks into the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.config import CacheConfig
from streamdiff_core.rope import temporal_positions
from streamdiff_core.types import RowPlan, SlotTable


@dataclass(frozen=True)
class SinkPolicy:
    """Fixed or adaptive sinks + rolling window, any of the five position maps."""

    config: CacheConfig = CacheConfig()

    @property
    def num_slots(self) -> int:
        """Sinks + window."""
        return self.config.cache_frames

    def new_table(self) -> SlotTable:
        """An empty row: sink slots first, then the window."""
        sinks, window = self.config.sink_frames, self.config.window_frames
        return SlotTable(frames=[None] * (sinks + window), is_sink=[True] * sinks + [False] * window)

    def plan(self, table: SlotTable, frame_ids: Sequence[int], descriptor: np.ndarray | None = None) -> RowPlan:
        """Place the chunk ``frame_ids`` and return what this forward writes and reads.

        Frames already in the table (later denoising steps, clean pass) keep their slots: no second eviction.

        Args:
            table: the row's slots; updated in place when the chunk is new.
            frame_ids: latent frame indices, ascending.
            descriptor: unit vector of the chunk's content for adaptive sinks, or None.

        Raises:
            ValueError: the chunk is longer than the window, or its frames are older than the cache.
        """
        if not all(table.slots_of(frame) for frame in frame_ids):
            sinks, window = self.config.sink_frames, self.config.window_frames
            room = window if table.num_filled else sinks + window  # the first chunk may fill the sinks
            if len(frame_ids) > room:
                raise ValueError(
                    f"a chunk of {len(frame_ids)} latent frames does not fit a window of {window} "
                    f"(+ {sinks} sinks at the start); raise window_frames"
                )
            for frame in frame_ids:
                self._place(table, frame, descriptor if len(frame_ids) == 1 else None)
            if descriptor is not None:
                self._remember(table, frame_ids, descriptor)
        writes = tuple((slot, j) for j, frame in enumerate(frame_ids) for slot in table.slots_of(frame))
        slot_positions = self._positions(table)
        query = tuple(slot_positions[table.slots_of(frame)[-1]] for frame in frame_ids)
        return RowPlan(writes, table.num_filled, slot_positions, query)

    def _place(self, table: SlotTable, frame: int, descriptor: np.ndarray | None) -> None:
        """Give ``frame`` a slot: a free one, a stale sink, or the oldest of the window."""
        newest = max((f for f in table.frames if f is not None), default=-1)
        if frame <= newest:
            raise ValueError(f"latent frame {frame} is not newer than the cache's newest frame {newest}")
        if table.num_filled < len(table.frames):
            table.frames[table.num_filled] = frame
            return
        stale = self._stale_sinks(table, descriptor)
        if self.config.adaptive_sink == "released" and stale:
            table.frames[stale[0]] = frame  # instead of rolling: the window stays as it is (SPEC §2.6)
            return
        rolling = [slot for slot, is_sink in enumerate(table.is_sink) if not is_sink]
        table.frames[min(rolling, key=lambda slot: table.frames[slot])] = frame
        for slot in stale:
            table.frames[slot] = frame

    def _stale_sinks(self, table: SlotTable, descriptor: np.ndarray | None) -> list[int]:
        """Sink slots less similar to the chunk than the threshold, least similar first; empty ones never."""
        if self.config.adaptive_sink == "off" or descriptor is None:
            return []
        similarity = {
            slot: float(np.dot(table.descriptors[slot], descriptor))
            for slot, is_sink in enumerate(table.is_sink)
            if is_sink and slot in table.descriptors
        }
        stale = [slot for slot, cosine in similarity.items() if cosine < self.config.adaptive_threshold]
        return sorted(stale, key=similarity.__getitem__)

    @staticmethod
    def _remember(table: SlotTable, frame_ids: Sequence[int], descriptor: np.ndarray) -> None:
        for frame in frame_ids:
            for slot in table.slots_of(frame):
                table.descriptors[slot] = descriptor

    def _positions(self, table: SlotTable) -> tuple[int, ...]:
        """Temporal position of each filled slot under the configured map."""
        filled = range(table.num_filled)
        by_age = sorted(filled, key=lambda s: table.frames[s])
        newest = max((table.frames[s] for s in filled if not table.is_sink[s]), default=math.inf)
        # A sink newer than the whole window was replaced by this chunk: it is read last, later on as a sink.
        sinks = [s for s in by_age if table.is_sink[s] and table.frames[s] <= newest]
        window = [s for s in by_age if s not in sinks]
        c = self.config
        sink_at, window_at = temporal_positions(
            c.positions,
            [table.frames[s] for s in sinks],
            [table.frames[s] for s in window],
            refresh_at=c.refresh_at,
            cache_frames=c.cache_frames,
            slot_origins=c.slot_origins,
            ahead_frames=c.ahead_frames,
        )
        at = dict(zip(sinks + window, sink_at + window_at, strict=True))
        return tuple(at[s] for s in filled)


def describe_content(latents: Tensor, grid: int = 4) -> np.ndarray:
    """Unit vector of what a chunk shows: its clean latents [F, C, h, w], averaged over frames on a 4 x 4 grid.

    Source: the chunk embedding h_t of paper §3.2; upstream compares rotated keys per layer (SPEC §2.6).
    """
    pooled = F.adaptive_avg_pool2d(latents.float().mean(0), grid).flatten()
    return (pooled / pooled.norm().clamp_min(1e-6)).cpu().numpy()
