"""The denoise stage of one stream: its schedule, its KV cache, and how a new prompt reaches them.

Chunks of noisy latents go in, chunks of clean latents come out in order, some ticks later under a stream batch. The
schedule says which forwards; the engine runs them; this object owns what lies between two of them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from streamdiff_core.attention import PromptContext
from streamdiff_core.config import Preset
from streamdiff_core.engine import Engine
from streamdiff_core.flow import nearest_table_sigma, sigma_from_timestep, sigma_table
from streamdiff_core.inputs import InputRule
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import make_policy
from streamdiff_core.lockstep import Rows, Work
from streamdiff_core.schedules import make_schedule
from streamdiff_core.schedules.steps import NoiseSource, Stepper
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.types import Chunk, DenoisedChunk, DenoiseSchedule, Emit, Fork, ForwardOp, RowOp

Events = Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]
"""One tick of a schedule."""
KEPT_ON_FLUSH = 2
"""Window frames that survive a flush (SEEDS §3.5); one where the window is so short that two would be all."""


class Denoiser:
    """Schedule + cache + kept inputs of one stream."""

    guide: InputRule | None = None
    """Rule that guides predictions."""

    def __init__(self, engine: Engine, preset: Preset, options: StreamOptions, tokens_per_frame: int) -> None:
        self.engine, self.options, self._tokens_per_frame = engine, options, tokens_per_frame
        self._noise_mode, self.sigma_of = preset.schedule.noise, sigma_from_timestep
        if preset.schedule.use_sigma_table:
            self.sigma_of = partial(nearest_table_sigma, table=sigma_table(preset.schedule.shift))
        self._num_real: dict[int, int] = {}
        self._switch_at: dict[int, str] = {}
        self._noise_of: dict[int, NoiseSource] = {}
        self._guided: dict[int, Chunk] = {}
        self.schedule = self.new_schedule()
        self.cache = self._new_cache()
        self._inputs: list[dict[int, tuple[Tensor, float]]] = [{} for _ in range(self.cache.num_rows)]

    def new_schedule(self) -> DenoiseSchedule:
        """The stream's schedule, empty."""
        o, noise_of = self.options, self._noise_of  # no reference to self: freed as soon as the stream is
        stepper = Stepper(lambda chunk_idx, *rest: noise_of[chunk_idx](chunk_idx, *rest), self.sigma_of)
        return make_schedule(o.schedule, stepper, o.steps, clean_pass=o.clean_pass, options=o.schedule_options)

    def _new_cache(self) -> KVCache:
        model = self.engine.transformer
        return KVCache(
            model.config,
            make_policy(self.options.policy, self.options.cache, self.options.policy_options),
            num_rows=self.schedule.num_cache_rows,
            tokens_per_frame=self._tokens_per_frame,
            dtype=model.dtype,
            device=model.device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of the inputs kept for re-caching."""
        return self.cache.nbytes + sum(x.numel() * x.element_size() for row in self._inputs for x, _ in row.values())

    def work(self, chunk: Chunk | None, switch: str | None = None) -> Work[list[DenoisedChunk]]:
        """Enter one chunk (None: flush one tick), with a prompt switch if one begins with it.

        Whoever drives it computes the rows it hands out, with those of other streams if they like. Guided
        predictions, and re-caching after a prompt switch, are forwards of their own.
        """
        done: list[DenoisedChunk] = []
        if chunk is not None:
            done = yield from self._set_options(chunk.options or self.options)
            if switch == "reset":
                done += yield from self._reset()
            elif switch is not None:
                self._switch_at[chunk.chunk_idx] = switch
            self._num_real[chunk.chunk_idx] = chunk.num_frames
            if self.guide is not None:
                self._guided[chunk.chunk_idx] = chunk
            self._noise_of[chunk.chunk_idx] = NoiseSource(self.options.seed, self._noise_mode)
        return done + (yield from self._tick(chunk))

    def _reset(self) -> Work[list[DenoisedChunk]]:
        """Finish what is in flight, then forget everything."""
        done = yield from self._finish()
        self.schedule = self.new_schedule()
        self.cache.clear()
        self._inputs = [{} for _ in self._inputs]
        return done

    def _set_options(self, options: StreamOptions) -> Work[list[DenoisedChunk]]:
        """Go on under other options; where schedule or cache change, finish what is in flight and build them anew.

        The next chunk then counts as a first one: it takes its steps in turn on one row, leaves at once and fills
        the other rows. Its past is what the last cache row held, the one that finished chunks leave through; under
        another policy it has none. Nor when one step becomes more: what a single step wrote is as noisy as a chunk
        begins, and a less noisy one that reads it as its sink is spoilt for good (``docs/LOG.md``).
        """
        built_from = ("steps", "schedule", "schedule_options", "clean_pass", "policy", "policy_options", "cache")
        if all(getattr(options, name) == getattr(self.options, name) for name in built_from):
            self.options = options
            return []
        done = yield from self._finish()
        past, inputs = self.cache, self._inputs[-1]
        too_noisy = self.options.steps == 1 < options.steps and not self.options.clean_pass
        carries = options.policy == self.options.policy and not too_noisy
        self.options = options
        self.schedule = self.new_schedule()
        self.cache = self._new_cache()
        if carries:
            self.cache.take_over(past, past.num_rows - 1)
        held = set(self.cache.tables[0].frames)
        self._inputs = [{f: x for f, x in inputs.items() if f in held} for _ in range(self.cache.num_rows)]
        return done

    def _finish(self) -> Work[list[DenoisedChunk]]:
        done: list[DenoisedChunk] = []
        while self.schedule.num_in_flight:
            done += yield from self._tick(None)
        return done

    def _tick(self, chunk: Chunk | None) -> Work[list[DenoisedChunk]]:
        """Carry out what the schedule asks for, once per chunk."""
        events, done, x0s = self.schedule.push(chunk), [], None
        while (rows := self._until_forward(events, x0s, done)) is not None:
            x0s = yield from self._forward(rows)
        return done

    def _until_forward(self, events: Events, x0s: list[Tensor] | None, done: list[DenoisedChunk]) -> list[RowOp] | None:
        """Answer the schedule and carry out what it asks for, up to its next forward; None at the end of the tick."""
        while True:
            try:
                event = events.send(x0s)
            except StopIteration:
                return None
            x0s = None
            if isinstance(event, ForwardOp):
                return event.rows
            if isinstance(event, Fork):
                self._fork(event)
            elif isinstance(event, Emit):
                num_frames = self._num_real.pop(event.chunk_idx)
                self._switch_at.pop(event.chunk_idx, None)
                del self._noise_of[event.chunk_idx]
                self._guided.pop(event.chunk_idx, None)
                done.append(DenoisedChunk(event.chunk_idx, event.latents, num_frames))

    def _forward(self, rows: list[RowOp]) -> Work[list[Tensor]]:
        for row in rows:
            self._enter_row(row)
        x0s = (yield self._with_cache(rows)) if self.guide is None else self._guided_forward(rows)
        for row in rows:
            self._keep_inputs(row)
        return x0s

    def _with_cache(self, rows: Sequence[RowOp]) -> Rows:
        return [(self.cache, row) for row in rows]

    def _guided_forward(self, rows: list[RowOp]) -> list[Tensor]:
        def forward(rows: Sequence[RowOp]) -> list[Tensor]:
            return self.engine.forward(self._with_cache(rows))

        chunks = self._guided.values()
        sources = {f: x for chunk in chunks for f, x in zip(chunk.frame_ids, chunk.latents, strict=True)}
        return self.guide.predict(rows, sources, forward)

    def _keep_inputs(self, row: RowOp) -> None:
        """Remember what was fed for every frame the cache row holds, for ``recache``."""
        kept = self._inputs[row.cache_row]
        times = row.timestep if isinstance(row.timestep, tuple) else (row.timestep,) * len(row.frame_ids)
        kept.update({f: (row.xt[j], times[j]) for j, f in enumerate(row.frame_ids)})
        held = set(self.cache.tables[row.cache_row].frames)
        for frame in [f for f in kept if f not in held]:
            del kept[frame]

    def _fork(self, fork: Fork) -> None:
        self.cache.fork(fork.src, fork.dst)
        for row in fork.dst:
            self._inputs[row] = dict(self._inputs[fork.src])

    def _enter_row(self, row: RowOp) -> None:
        """A chunk reaches a cache row for the first time: carry out its prompt switch, compute again what the policy
        asks for."""
        table = self.cache.tables[row.cache_row]
        if table.slots_of(row.frame_ids[0]):
            return
        switch = self._switch_at.get(row.chunk_idx)
        if switch == "flush":
            kept = min(KEPT_ON_FLUSH, max(1, self.options.cache.window_frames - 2))
            self.cache.keep_recent(kept, rows=(row.cache_row,))
        for frames in self.cache.policy.before_chunk(table, switch):
            known = [f for f in frames if f in self._inputs[row.cache_row]]
            if known:
                self.engine.rewrite([(self.cache, self.recache_row(row.cache_row, row.prompt, known))])

    def recache_row(self, cache_row: int, prompt: PromptContext, frames: Sequence[int] | None = None) -> RowOp:
        """The joint forward that rewrites held frames (default: all) under another prompt (SEEDS §3.3)."""
        frames = sorted(self._inputs[cache_row] if frames is None else frames)
        inputs = [self._inputs[cache_row][f] for f in frames]
        return RowOp(
            xt=torch.stack([x for x, _ in inputs]), sigma=0.0, timestep=tuple(t for _, t in inputs),
            frame_ids=tuple(frames), cache_row=cache_row, chunk_idx=-1, step=0, prompt=prompt, kind="recache",
        )  # fmt: skip
