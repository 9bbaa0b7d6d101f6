"""``StreamPipeline`` over several processes or GPUs: each rank holds some layers, chunks follow each other through.

Rank 0 encodes and speaks with the caller, the last rank decodes; ``start`` gives a session with the same methods and
the same output as in one process. The schedule becomes W interleaved copies of itself, one per micro-batch in flight
(W ranks): in micro-step n row r holds chunk n - r * W, as in SPEC §6.2, and chunk 1 has taken all S steps in micro-step
1 + (S - 1) * W. Upstream waits until S * W - 1 and loses W - 2 chunks (SPEC §6.6); here ``flush`` drains every lane.

``join`` makes this process a rank (``torchrun``, also over several nodes); ``launch`` starts local ranks itself.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from streamdiff_core.config import Preset, get_preset
from streamdiff_core.denoiser import Denoiser, Events
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.parallel.block_scheduler import Split, even_split
from streamdiff_core.parallel.links import Links
from streamdiff_core.parallel.stage import Stage, StagePart
from streamdiff_core.parallel.worker import serve
from streamdiff_core.pipeline import StreamPipeline, load_preset, pick_device, pick_dtype
from streamdiff_core.ring_engine import RingEngine, Ticket
from streamdiff_core.session import StreamSession
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.types import Chunk, DenoisedChunk, DenoiseSchedule, RowOp, StageLostError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tick:
    """A push into a lane that waits for its x0s."""

    lane: int
    events: Events
    num_forwards: int = 0
    ticket: Ticket | None = None


class Lanes:
    """W copies of a schedule that take turns, so that W micro-batches are in flight.

    That is exact where every chunk takes the same forwards and only its own x0s decide them. Any other schedule gets
    one lane, which waits for each forward: weights are shared out all the same, but stages take turns.
    """

    def __init__(self, schedules: list[DenoiseSchedule]) -> None:
        self.schedules, self.tick, self.num_in_flight = schedules, 0, 0
        self.num_cache_rows = schedules[0].num_cache_rows
        self.is_first = True
        cost = schedules[0].cost
        self.cost = replace(cost, latency_chunks=(cost.latency_chunks + 1) * len(schedules) - 1)

    @property
    def num_forwards(self) -> int | None:
        """Forwards of every tick but the first; None where ticks may not overlap."""
        return forwards_of(self.schedules[0])

    def push(self, chunk: Chunk | None) -> Events:
        """Begin a tick in the next lane."""
        lane = self.schedules[self.tick % len(self.schedules)]
        self.tick += 1
        self.num_in_flight += chunk is not None
        return lane.push(chunk)

    def first_is_done(self) -> None:
        """The opening chunk has filled all cache rows; every lane goes on from there."""
        self.is_first = False
        for schedule in self.schedules[1:]:
            schedule.is_first = False


def forwards_of(schedule: DenoiseSchedule) -> int | None:
    """Forwards that each chunk takes after the first, None where that varies or chunks look at each other."""
    if getattr(schedule, "step_lists", None) or getattr(schedule, "cache_per_step", False):
        return None
    return getattr(schedule, "forwards_per_chunk", None)


class RingDenoiser(Denoiser):
    """A stream's denoise stage on the ring: as ``Denoiser``, but a tick only waits for the x0 it needs."""

    engine: RingEngine
    schedule: Lanes

    def __init__(self, engine: RingEngine, preset: Preset, options: StreamOptions, tokens_per_frame: int) -> None:
        self._under_way: deque[Tick] = deque()
        super().__init__(engine, preset, options, tokens_per_frame)
        self.stream = engine.open_stream()

    def new_schedule(self) -> Lanes:
        """One copy of the schedule per rank, where that is exact."""
        first = super().new_schedule()
        num_lanes = 1 if forwards_of(first) is None else self.engine.num_lanes
        return Lanes([first, *(super(RingDenoiser, self).new_schedule() for _ in range(num_lanes - 1))])

    def _new_cache(self) -> Any:
        o = self.options
        if self.engine.size > 1 and getattr(POLICIES[o.policy], "across_layers", False):
            raise ValueError(
                f"policy {o.policy!r} lets one layer decide for all; run it in one process, or take another"
            )
        rows = self.schedule.num_cache_rows
        return self.engine.new_cache(o.policy, o.cache, o.policy_options, rows, self._tokens_per_frame)

    def _set_options(self, options: StreamOptions) -> list[DenoisedChunk]:
        past = self.cache
        done = super()._set_options(options)
        if self.cache is not past:
            self.engine.command("drop_cache", number=past.number)
        return done

    def _tick(self, chunk: Chunk | None) -> list[DenoisedChunk]:
        """Issue this tick's forwards and hand out what has come back; waits only for what this tick depends on."""
        lanes, done = self.schedule, []
        self.engine.links.check()  # before the schedule moves: a stream that lost a rank keeps saying so
        self.engine.maybe_balance()
        lane, opens = lanes.tick % len(lanes.schedules), lanes.is_first and chunk is not None
        while any(tick.lane == lane for tick in self._under_way) or self._is_back():
            self._resume(done)
        tick = Tick(lane, lanes.push(chunk))
        self._go_on(tick, None, done)
        alone = opens or lanes.num_forwards is None
        while self._under_way and (alone or 0 < tick.num_forwards < lanes.num_forwards):
            self._resume(done)
        if opens:
            lanes.first_is_done()
        lanes.num_in_flight -= len(done)
        for chunk in done if lanes.num_forwards is None else ():
            self.engine.decode(self.stream, chunk.latents, chunk.chunk_idx)
        return done

    def _is_back(self) -> bool:
        return bool(self._under_way) and self._under_way[0].ticket.is_done

    def _resume(self, done: list[DenoisedChunk]) -> None:
        """Go on with the oldest tick under way, with the x0s it waits for."""
        tick = self._under_way.popleft()
        self._go_on(tick, tick.ticket.wait(), done)

    def _go_on(self, tick: Tick, x0s: list[Tensor] | None, done: list[DenoisedChunk]) -> None:
        rows = self._until_forward(tick.events, x0s, done)
        if rows is not None:
            tick.ticket = self._issue(rows)
            tick.num_forwards += 1
            self._under_way.append(tick)

    def _issue(self, rows: list[RowOp]) -> Ticket:
        """As ``_forward``, without waiting; rows at their last step are decoded on the last rank at once."""
        for row in rows:
            self._enter_row(row)
        last = None if self.schedule.num_forwards is None else self.options.steps - 1
        streams = [self.stream if row.kind == "denoise" and row.step == last else None for row in rows]
        ticket = self.engine.issue([(self.cache, row) for row in rows], streams)
        for row in rows:
            self._keep_inputs(row)
        return ticket


class ParallelSession(StreamSession):
    """One stream on a ``ParallelPipeline``: the methods and the output of ``StreamSession``."""

    denoiser_type = RingDenoiser
    pipe: ParallelPipeline

    def _begin_stream(self) -> None:
        self.timer = self.pipe.engine.stage.timer
        super()._begin_stream()

    def _decode(self, denoised: DenoisedChunk) -> Tensor:
        """Pixels that the last rank has decoded, or still will; chunks come in order."""
        return self.pipe.engine.pixels(self._denoiser.stream)[None]

    def close(self) -> None:
        """Free the stream's state on all ranks; later calls raise ``StreamClosedError``."""
        if not self._closed and self.pipe.is_open:
            self.pipe.engine.close_stream(self._denoiser.stream, self._denoiser.cache)
        super().close()


class ParallelPipeline(StreamPipeline):
    """Rank 0 of the ring; ``start`` makes streams. Close it, or use it in a ``with``, so that the other ranks end."""

    session_type = ParallelSession

    def __init__(self, preset: Preset, stage: Stage, links: Links, vae: Any, text_encoder: Any, **rules: Any) -> None:
        super().__init__(preset, stage.transformer, vae, text_encoder)
        self.engine = RingEngine(stage, links, preset.vae, **rules)
        self._workers: list[subprocess.Popen] = []
        self._closed = False

    @property
    def split(self) -> Split:
        """Layers per rank."""
        return self.engine.stage.split

    @property
    def is_open(self) -> bool:
        """Whether the ring still runs."""
        return not self._closed and self.engine.links.is_alive

    def rebalance(self, split: Split) -> None:
        """Move layers between ranks now, in the middle of whatever streams are running; output stays the same.

        Raises:
            ValueError: not one count per rank, or another number of layers.
        """
        self.engine.rebalance(split)

    def close(self) -> None:
        """End all ranks; may be called again."""
        if self._closed:
            return
        patience_s = 10 if self.is_open else 1
        self._closed = True
        self.engine.close()
        for worker in self._workers:
            try:
                worker.wait(patience_s)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.engine.links.join()

    def __enter__(self) -> ParallelPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def join_modules(
    preset: Preset,
    transformer: CausalWanTransformer,
    vae: nn.Module,
    text_encoder: Any,
    links: Links,
    *,
    split: Split | None = None,
    **rules: Any,
) -> ParallelPipeline | None:
    """Make this process (or thread) one rank of a ring, from modules made elsewhere.

    Args:
        transformer: the whole model, of which the rank's part is kept, or just that part.
        split: layers per rank; default equal shares.
        rules: ``num_lanes``, ``balance_every`` and ``balance_rule`` of ``RingEngine``.

    Returns:
        The pipeline on rank 0. The other ranks work until it is closed and then return None.
    """
    split = even_split(preset.model.num_layers, links.size) if split is None else split
    part = StagePart.of(split, links.rank)
    dtype = next(x.dtype for x in transformer.parameters())
    if len(transformer.blocks) == preset.model.num_layers:
        part.keep(transformer)
    for module in (transformer, vae, text_encoder):
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    return _join(preset, transformer.fuse(), vae, text_encoder, links, split, dtype, links.device, rules)


def join(
    preset_name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    split: Split | None = None,
    links: Links | None = None,
    rules: dict[str, Any] | None = None,
    **options: Any,
) -> ParallelPipeline | None:
    """Make this process one rank of a ring, loading only its part of the weights.

    Args:
        device: ``auto``: the GPU of this local rank, or the CPU.
        split: layers per rank; default equal shares.
        links: default: what ``torchrun`` says in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
        rules: ``num_lanes``, ``balance_every`` and ``balance_rule`` of ``RingEngine``.
        options: as for ``StreamPipeline.from_preset``; the same on every rank.

    Returns:
        The pipeline on rank 0. The other ranks work until it is closed and then return None.

    Raises:
        ValueError: not started as one of several ranks.
        StageLostError: (other ranks) the job ended because a rank was lost.
    """
    preset = get_preset(preset_name)
    links = links or links_from_environment(device)
    split = even_split(preset.model.num_layers, links.size) if split is None else tuple(split)
    part, place = StagePart.of(split, links.rank), links.device
    transformer, vae, text_encoder = load_preset(preset, device=str(place), dtype=dtype, part=part, **options)
    transformer.eval().requires_grad_(False).fuse()
    return _join(preset, transformer, vae, text_encoder, links, split, pick_dtype(dtype, place), place, rules or {})


def _join(
    preset: Preset,
    transformer: CausalWanTransformer,
    vae: nn.Module,
    text_encoder: Any,
    links: Links,
    split: Split,
    dtype: torch.dtype,
    device: torch.device,
    rules: dict[str, Any],
) -> ParallelPipeline | None:
    stage = Stage(transformer, split, links.rank, dtype=dtype, device=device, vae=vae)
    if links.rank == 0:
        return ParallelPipeline(preset, stage, links, vae, text_encoder, **rules)
    serve(stage, links)
    return None


def links_from_environment(device: str = "auto") -> Links:
    """The links of a process that ``torchrun`` or ``launch`` started.

    Raises:
        ValueError: this process is not one of several ranks.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise ValueError("this process is not one of several ranks; start it with torchrun, or call launch(…)")
    store, rank, size = next(rendezvous("env://"))
    local, num_local = (
        int(os.environ.get(name, other)) for name, other in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size))
    )
    place = pick_device(device)
    num_gpus = torch.cuda.device_count() if place.type == "cuda" else 0
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", local % num_gpus)
        torch.cuda.set_device(place)
    end = None if rank == 0 else _end_process
    return Links(store, rank, size, place, nccl=num_gpus >= num_local and dist.is_nccl_available(), on_death=end)


def _end_process(_reason: str) -> None:
    """A rank that cannot be told leaves anyway: it may be waiting for numbers that will never come."""
    threading.Timer(2.0, os._exit, (1,)).start()


def launch(preset_name: str, num_stages: int, *, device: str = "auto", **options: Any) -> ParallelPipeline:
    """Start ``num_stages - 1`` local processes and be rank 0 of the ring; arguments as for ``join``.

    Raises:
        ValueError: fewer than one stage, or more than the model has layers and VAE ends.
    """
    most = get_preset(preset_name).model.num_layers + 2
    if not 1 <= num_stages <= most:
        raise ValueError(f"num_stages must be between 1 and {most} for preset {preset_name!r}, got {num_stages}")
    store = dist.TCPStore("127.0.0.1", 0, num_stages, is_master=True, wait_for_workers=False)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(num_stages)}
    plain = json.dumps({"preset_name": preset_name, "device": device, **options}, default=str)
    command = [sys.executable, "-m", "streamdiff_core.parallel_pipeline", plain]
    workers = [
        subprocess.Popen(command, env={**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, num_stages)
    ]
    try:
        place = pick_device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", 0)
        nccl = place.type == "cuda" and torch.cuda.device_count() >= num_stages and dist.is_nccl_available()
        pipe = join(preset_name, device=device, links=Links(store, 0, num_stages, place, nccl=nccl), **options)
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    pipe._workers = workers
    return pipe


def main(argv: Sequence[str] | None = None) -> int:
    """One rank that ``launch`` started; its argument is the call of ``join`` as JSON."""
    try:
        join(**json.loads((sys.argv[1:] if argv is None else argv)[0]))
    except StageLostError as error:  # rank 0 says it to the user, unless it is the one that is gone
        logger.info("%s", error)
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
