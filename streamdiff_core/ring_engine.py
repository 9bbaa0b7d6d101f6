"""The engine of rank 0 when the layers are spread over several ranks: same calls as ``Engine``, several under way.

``issue`` sends a micro-batch on its way and returns a ticket; x0 comes back from the last rank while the next batches
are already travelling. Every rank works through its commands in one order, so the only thing to wait for is an x0 that
a next step needs (SPEC §6.2). ``balance`` measures all ranks and moves layers when that pays (paper §4).
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from streamdiff_core.config import CacheConfig, VAEConfig
from streamdiff_core.engine import batches
from streamdiff_core.parallel.block_scheduler import BalanceRule, RankTimes, Split, decide
from streamdiff_core.parallel.links import Links, Parcel
from streamdiff_core.parallel.stage import MicroBatch, Stage
from streamdiff_core.parallel.worker import publish_report
from streamdiff_core.ring_handles import RingPrompt, SharedCache, Ticket
from streamdiff_core.types import RowOp, StageLostError

MAX_PROMPTS = 16
"""Prompts that the ranks keep; more than the rows of one batch."""


class RingEngine:
    """Runs rows on the ring; rank 0's own layers inside ``issue``."""

    def __init__(
        self,
        stage: Stage,
        links: Links,
        vae: VAEConfig,
        *,
        num_lanes: int | None = None,
        balance_every: int | None = 64,
        balance_rule: BalanceRule | None = None,
    ) -> None:
        """The first rank's side of the ring.

        Args:
            stage: this rank's layers.
            vae: sizes of what the last rank decodes.
            num_lanes: micro-batches in flight, default one per rank.
            balance_every: micro-batches between two looks at the balance; None: layers stay where they are.
            balance_rule: when a better split is worth moving.
        """
        self.stage, self.links, self.transformer, self._vae = stage, links, stage.transformer, vae
        self.num_lanes = num_lanes or links.size
        self._balance_every, self._balance_rule = balance_every, balance_rule
        self.num_micro_batches = self._balanced_at = 0
        self._prompts: OrderedDict[RingPrompt, int] = OrderedDict()
        self._numbers = 0
        self._expected: queue.Queue = queue.Queue()  # what comes back from the last rank, in this order
        self._expected_pixels: queue.Queue = queue.Queue()
        self._decoded: dict[int, queue.Queue] = {}
        self._unopened: set[int] = set()
        if links.size > 1:
            links.guard(self._receive_x0s, "x0")
            links.guard(self._receive_pixels, "pixels")

    @property
    def size(self) -> int:
        """Ranks in the ring."""
        return self.links.size

    # --- forwards -------------------------------------------------------------------------------------------------

    def forward(self, rows: Sequence[tuple[SharedCache, RowOp]]) -> list[Tensor]:
        """x0 [F, C, h, w] of each row; waits for the whole ring."""
        return self.issue(rows).wait()

    def rewrite(self, rows: Sequence[tuple[SharedCache, RowOp]]) -> None:
        """Run rows only for what they leave in the caches; waits for nothing."""
        self.issue(rows, wants_x0=False)

    @torch.inference_mode()
    def issue(
        self,
        rows: Sequence[tuple[SharedCache, RowOp]],
        streams: Sequence[int | None] | None = None,
        *,
        wants_x0: bool = True,
    ) -> Ticket:
        """Send rows on their way.

        Args:
            streams: per row the stream whose decoder takes the x0 on the last rank, None where steps follow.
            wants_x0: False if nobody asks for the result.

        Raises:
            ValueError: two rows write the same cache row.
        """
        ticket = Ticket(self, len(rows) if wants_x0 else 0)
        streams = [None] * len(rows) if streams is None else streams
        slots = [self._slot(row.prompt) for _, row in rows]
        for members in batches(rows):
            batch = self._describe([(*rows[i], slots[i], streams[i]) for i in members], wants_x0)
            xt = torch.stack([rows[i][1].xt for i in members]).contiguous()  # as it will arrive: sums follow strides
            self._send(batch, xt, members, ticket)
        return ticket

    def _describe(self, rows: list[tuple[SharedCache, RowOp, int, int | None]], wants_x0: bool) -> MicroBatch:
        ops = [op for _, op, _, _ in rows]
        frames = len(ops[0].frame_ids)
        return MicroBatch(
            shape=(len(rows), *ops[0].xt.shape),
            dtype=str(ops[0].xt.dtype).removeprefix("torch."),
            timesteps=tuple(op.timestep if isinstance(op.timestep, tuple) else (op.timestep,) * frames for op in ops),
            sigmas=tuple(op.sigma for op in ops),
            caches=tuple(cache.number for cache, *_ in rows),
            cache_rows=tuple(op.cache_row for op in ops),
            frame_ids=tuple(op.frame_ids for op in ops),
            prompts=tuple(slot for _, _, slot, _ in rows),
            descriptors=tuple(None if op.descriptor is None else op.descriptor.tolist() for op in ops),
            streams=tuple(stream for *_, stream in rows),
            chunk_idx=max(op.chunk_idx for op in ops),
            wants_x0=wants_x0,
        )

    def _send(self, batch: MicroBatch, xt: Tensor, members: list[int], ticket: Ticket) -> None:
        self.num_micro_batches += 1
        self._tell({"do": "batch", "batch": batch.to_plain()})
        if self.size > 1:
            self.links.send("skip", xt, self.size - 1)
        out = self.stage.run(batch, None, xt)
        finished = [(i, stream) for i, stream in enumerate(batch.streams) if stream is not None]
        if self.size > 1:
            self.links.send("tokens", out, 1)
            if batch.wants_x0:
                self._expected.put((ticket, members, batch))
            for _, stream in finished:
                self._expected_pixels.put(self._pixels(stream, batch.shape[1:], batch.dtype))
        elif batch.wants_x0:
            ticket.arrive(members, Parcel(out))
            for i, stream in finished:
                self._decoded[stream].put(Parcel(self.stage.decode(stream, out[i], batch.chunk_idx)))

    def _receive_x0s(self) -> None:
        while (expected := self._expected.get()) is not None:
            ticket, members, batch = expected
            ticket.arrive(members, self.links.recv("x0", batch.shape, getattr(torch, batch.dtype), self.size - 1))

    def _receive_pixels(self) -> None:
        while (expected := self._expected_pixels.get()) is not None:
            stream, shape, dtype = expected
            pixels = self.links.recv("pixels", shape, getattr(torch, dtype), self.size - 1)
            if stream in self._decoded:  # else its session was closed meanwhile
                self._decoded[stream].put(pixels)

    def _pixels(self, stream: int, shape: Sequence[int], dtype: str) -> tuple[int, tuple[int, ...], str]:
        """What the decoder will make of latents [F, C, h, w]; a stream's first latent frame is one pixel frame."""
        f, _, h, w = shape
        count = self._vae.temporal_stride * f - (self._vae.temporal_stride - 1 if stream in self._unopened else 0)
        self._unopened.discard(stream)
        return stream, (count, 3, h * self._vae.spatial_stride, w * self._vae.spatial_stride), dtype

    # --- prompts, streams, caches ---------------------------------------------------------------------------------

    def encode_prompt(self, context: Tensor) -> RingPrompt:
        """Prompt tokens [1, text_len, text_dim] -> what rows carry; it travels when a row first needs it."""
        return RingPrompt(self.transformer.embed_prompt(context))

    def _slot(self, prompt: RingPrompt) -> int:
        """The prompt's number on all ranks, sent now if they do not know it; the one longest unused makes room."""
        if prompt not in self._prompts:
            slot = self._prompts.popitem(last=False)[1] if len(self._prompts) == MAX_PROMPTS else len(self._prompts)
            self._prompts[prompt] = slot
            self._tell({"do": "prompt", "slot": slot})
            if self.size > 1:
                self.links.send("tokens", prompt.embedded, 1)
            self.stage.set_prompt(slot, prompt.embedded)
        self._prompts.move_to_end(prompt)
        return self._prompts[prompt]

    def new_cache(self, policy: str, config: CacheConfig, options: Any, num_rows: int, tokens: int) -> SharedCache:
        """A cache of ``num_rows`` rows on every rank, for its layers."""
        number = self._number()
        self.command("new_cache", number=number, policy=policy, config=asdict(config), options=dict(options or {}),
                     num_rows=num_rows, tokens=tokens)  # fmt: skip
        return SharedCache(self, number)

    def open_stream(self) -> int:
        """Decoder memory for a new stream; its number."""
        stream = self._number()
        self._decoded[stream] = queue.Queue()
        self._unopened.add(stream)
        self.command("open_decoder", stream=stream)
        return stream

    def decode(self, stream: int, latents: Tensor, chunk_idx: int) -> None:
        """Have the last rank decode latents [F, C, h, w] that did not leave ``issue`` as a stream's finished row."""
        latents, dtype = latents.contiguous(), str(latents.dtype).removeprefix("torch.")
        if self.size == 1:
            self._decoded[stream].put(Parcel(self.stage.decode(stream, latents, chunk_idx)))
            return
        shape = list(latents.shape)
        self._tell({"do": "decode", "stream": stream, "shape": shape, "dtype": dtype, "chunk_idx": chunk_idx})
        self.links.send("skip", latents, self.size - 1)
        self._expected_pixels.put(self._pixels(stream, shape, dtype))

    def pixels(self, stream: int) -> Tensor:
        """Decoded pixels [T, 3, H, W] of the stream's next chunk; waits for them."""
        return self.links.get(self._decoded[stream]).open()

    def close_stream(self, stream: int, cache: SharedCache) -> None:
        """Free what the ranks hold of a stream."""
        del self._decoded[stream]
        self.command("close_decoder", stream=stream)
        self.command("drop_cache", number=cache.number)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def command(self, do: str, **arguments: Any) -> None:
        """Have every rank, this one included, call a method of its ``Stage``."""
        self._tell({"do": do, **arguments})
        getattr(self.stage, do)(**arguments)

    def _tell(self, command: dict[str, Any]) -> None:
        self.links.check()
        for rank in range(1, self.size):
            self.links.send_json("control", command, rank)

    # --- balance --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def rebalance(self, split: Split) -> None:
        """Move layers so that rank r holds ``split[r]`` of them; streams go on as if nothing had happened.

        Raises:
            ValueError: not one count per rank, or another number of layers.
        """
        if len(split) != self.size or sum(split) != sum(self.stage.split) or min(split) < 0:
            raise ValueError(f"split {split} must give {sum(self.stage.split)} layers to {self.size} stages")
        self._tell({"do": "move_layers", "split": list(split)})
        self.stage.move_layers(tuple(split), self.links)

    def maybe_balance(self) -> None:
        """``balance``, now and then."""
        if self.size > 1 and self._balance_every and self.num_micro_batches - self._balanced_at >= self._balance_every:
            self._balanced_at = self.num_micro_batches
            self.balance(self._balance_rule)

    def balance(self, rule: BalanceRule | None = None) -> Split | None:
        """Measure all ranks and move layers if that pays; the new split, or None."""
        times = [report["times"] for report in self.report()]
        if any(t is None for t in times):
            return None
        known = [t["layer_ms"] for t in times if not math.isnan(t["layer_ms"])]
        mean = sum(known) / len(known)
        ranks = [RankTimes(**{**t, "layer_ms": mean if math.isnan(t["layer_ms"]) else t["layer_ms"]}) for t in times]
        split = decide(ranks, self.stage.split, rule)
        if split is not None:
            self.rebalance(split)
        return split

    def report(self) -> list[dict[str, Any]]:
        """Per rank ``times``, ``layers``, ``nbytes``, ``trace``, ``moved_ms`` and their ``origin_s``; waits for all."""
        key = f"report {self._number()}"
        self._tell({"do": "report", "key": key})
        publish_report(key, self.stage, self.links)
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        while not self.links.store.check(keys):
            self.links.check()
            time.sleep(0.002)
        return [json.loads(self.links.store.get(k)) for k in keys]

    def close(self) -> None:
        """Let all ranks finish and stop; if a rank was lost there is nothing to finish."""
        if self.links.is_alive:
            with contextlib.suppress(StageLostError):
                self._tell({"do": "stop"})
                self.links.close()
        self._expected.put(None)
        self._expected_pixels.put(None)
        self.links.abandon()
