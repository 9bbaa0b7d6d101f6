"""``StreamPipeline`` over several processes or GPUs: each rank holds some layers, chunks follow each other through.

Rank 0 encodes and speaks with the caller, the last rank decodes; ``start`` gives a session with the same methods and
the same output as in one process (``ring_denoiser``: how chunks overlap; ``ring_engine``: how they travel).

``join`` makes this process a rank (``torchrun``, also over several nodes); ``launch`` starts local ranks itself.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from streamdiff_core.chunk_decoder import ChunkDecoder
from streamdiff_core.config import Preset, get_preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.parallel.block_scheduler import Split, even_split
from streamdiff_core.parallel.links import Links
from streamdiff_core.parallel.stage import Stage, StagePart
from streamdiff_core.parallel.worker import serve
from streamdiff_core.pipeline import StreamPipeline, load_preset, pick_device, pick_dtype
from streamdiff_core.ring_denoiser import RingDenoiser
from streamdiff_core.ring_engine import RingEngine
from streamdiff_core.session import StreamSession
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.types import DenoisedChunk, StageLostError

logger = logging.getLogger(__name__)

LOCAL = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class RingChunkDecoder(ChunkDecoder):
    """The VAE's part is done on the last rank, the rest here."""

    def __init__(self, engine: RingEngine, stream: int, *parts: Any) -> None:
        super().__init__(*parts)
        self._engine, self._stream = engine, stream

    def pixels(self, denoised: DenoisedChunk) -> Tensor:
        """Pictures that the last rank has decoded, or still will; chunks come in order."""
        return self._engine.pixels(self._stream)


class ParallelSession(StreamSession):
    """One stream on a ``ParallelPipeline``: the methods and the output of ``StreamSession``."""

    denoiser_type = RingDenoiser
    pipe: ParallelPipeline

    def _begin_stream(self) -> None:
        self.timer = self.pipe.engine.stage.timer
        super()._begin_stream()

    def _make_decoder(self) -> ChunkDecoder:
        pipe, stream = self.pipe, self._denoiser.stream
        return RingChunkDecoder(pipe.engine, stream, pipe.vae, pipe.preset, self._streams, self.timer)

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

    def _choose_attention(self, options: StreamOptions) -> None:
        """Nothing: every rank keeps PyTorch's choice."""

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
    store = local_store(num_stages)
    here = {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(num_stages)}
    plain = json.dumps({"preset_name": preset_name, "device": device, **options}, default=str)
    command = [sys.executable, "-m", "streamdiff_core.parallel_pipeline", plain]
    workers: list[subprocess.Popen] = []
    try:
        with gloo_on_loopback():
            for rank in range(1, num_stages):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                workers.append(subprocess.Popen(command, env={**os.environ, **here, **ranks}))
            place = pick_device(device)
            if place.type == "cuda" and place.index is None:
                place = torch.device("cuda", 0)
            nccl = place.type == "cuda" and torch.cuda.device_count() >= num_stages and dist.is_nccl_available()
            links = Links(store, 0, num_stages, place, nccl=nccl)
        pipe = join(preset_name, device=device, links=links, **options)
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    pipe._workers = workers
    return pipe


def local_store(num_ranks: int) -> dist.TCPStore:
    """A store that listens on this machine only: by itself ``TCPStore`` listens on every address, whatever its host."""
    with socket.create_server((LOCAL, 0)) as listener:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            LOCAL, port, num_ranks, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


@contextmanager
def gloo_on_loopback() -> Iterator[None]:
    """Inside, gloo listens on the loopback interface and not on that of the host's name, unless the user named one."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if GLOO_INTERFACE in os.environ or not loopback:
        yield
        return
    os.environ[GLOO_INTERFACE] = loopback[0]
    try:
        yield
    finally:
        del os.environ[GLOO_INTERFACE]


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
