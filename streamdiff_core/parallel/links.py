"""What travels between ranks, and how a rank notices that another one is gone.

Commands go from rank 0 to every rank over the host (gloo): small JSON that says what comes next and in which shape, so
that tensors need no header and no rank ever asks a GPU for a number (upstream blocks on ``header.tolist()`` for each
message, SPEC §6.2). Tensors go from device to device: NCCL where every rank has a GPU of its own, else gloo. Streams
wait for each other both ways; upstream sends without waiting for what computes the message (SPEC §6.3).

Every rank beats into the store. A rank that stops beating, or says why it failed, ends the job everywhere with one
``StageLostError``; upstream's ring hangs (SPEC §6.6). No global process group: ranks can be threads of one process.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamdiff_core.types import StageLostError

logger = logging.getLogger(__name__)

WIRES = ("control", "tokens", "skip", "x0", "pixels", "layers", "layer_info")
"""Independent channels: what waits on one never holds up another."""
DEVICE_WIRES = ("tokens", "skip", "x0", "pixels", "layers")
CONTROL_BYTES = 65_536
"""Fixed size of a JSON message."""
MAX_UNSENT = 32
"""Messages under way per rank before a send waits for the oldest."""
FOREVER = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A tensor that arrived, or on CUDA will have arrived when ``ready`` is reached."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None

    def open(self) -> Tensor:
        """The tensor, usable on the current stream."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            self.tensor.record_stream(stream)
        return self.tensor


class Links:
    """All channels of one rank."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device | str = "cpu",
        *,
        nccl: bool = False,
        dead_after_s: float = 6.0,
        start_within_s: float = 300.0,
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        """Connect to all ranks; returns when all are there.

        Args:
            store: shared by all ranks (``TCPStore`` between processes, ``HashStore`` between threads).
            nccl: tensors by NCCL; needs one GPU per rank.
            dead_after_s: silence after which a rank counts as dead.
            start_within_s: how long to wait for the other ranks.
            on_death: called once, from the watching thread, with the reason why the job ends.

        Raises:
            StageLostError: not all ranks came.
        """
        self.store, self.rank, self.size, self.device = store, rank, size, torch.device(device)
        store.set(f"here/{rank}", "")
        try:
            store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=start_within_s))
        except dist.DistStoreError as error:
            late = [other for other in range(size) if not store.check([f"here/{other}"])]
            raise StageLostError(f"stages {late} of {size} did not start within {start_within_s:.0f} s") from error
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, FOREVER)
        self._nccl: dict[str, tuple[Any, torch.cuda.Stream]] = {}
        if nccl:
            for wire in DEVICE_WIRES:  # a communicator each, so that the ring's two directions cannot block each other
                group = dist.ProcessGroupNCCL(dist.PrefixStore(wire, store), rank, size)
                self._nccl[wire] = group, torch.cuda.Stream(self.device)
        self._unsent: deque[tuple[Any, Tensor]] = deque()
        self._error: str | None = None
        self._closed, self._over = threading.Event(), threading.Event()  # by its owner; for whatever reason
        self._dead_after_s, self._suspicious_s, self._on_death = dead_after_s, min(dead_after_s, 3.0), on_death
        self._is_suspicious = False
        self._threads = [threading.Thread(target=self._beat, daemon=True, name=f"beat {rank}")]
        self._threads[0].start()

    # --- tensors and commands -------------------------------------------------------------------------------------

    def send(self, wire: str, tensor: Tensor, to: int) -> None:
        """Send a tensor that nobody changes any more; returns at once.

        Raises:
            StageLostError: the other side is gone; it takes some seconds to find out who.
        """
        try:
            self._unsent.append(self._start_sending(wire, tensor.contiguous(), to))
            while len(self._unsent) > MAX_UNSENT:
                self._unsent.popleft()[0].wait()
        except RuntimeError as error:
            self.failed(error)
            self.check()
            raise

    def _start_sending(self, wire: str, tensor: Tensor, to: int) -> tuple[Any, Tensor]:
        """What to wait for, and the tensor that has to stay until then."""
        if wire in self._nccl:
            group, stream = self._nccl[wire]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                return group.send([tensor], to, 0), tensor
        tensor = tensor.cpu()
        return self._gloo.send([tensor], to, WIRES.index(wire)), tensor

    def recv(self, wire: str, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Parcel:
        """Receive a tensor of known shape. On gloo this waits for it, with NCCL only a stream does."""
        if wire in self._nccl:
            group, stream = self._nccl[wire]
            with torch.cuda.stream(stream):
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
                group.recv([tensor], source, 0).wait()
                ready = torch.cuda.Event()
                ready.record(stream)
            return Parcel(tensor, ready)
        tensor = torch.empty(shape, dtype=dtype)
        self._gloo.recv([tensor], source, WIRES.index(wire)).wait()
        return Parcel(tensor.to(self.device) if wire in DEVICE_WIRES else tensor)

    def send_json(self, wire: str, value: Any, to: int) -> None:
        """Send plain data in a message of fixed size."""
        text = json.dumps(value).encode()
        assert len(text) <= CONTROL_BYTES, f"a command of {len(text)} bytes does not fit its message"
        message = torch.full((CONTROL_BYTES,), 32, dtype=torch.uint8)  # blanks, which JSON ignores
        message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.send(wire, message, to)

    def recv_json(self, wire: str, source: int) -> Any:
        """Receive plain data."""
        return json.loads(self.recv(wire, (CONTROL_BYTES,), torch.uint8, source).tensor.numpy().tobytes())

    # --- is everybody there? --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if the job has ended.

        Raises:
            StageLostError: a rank died, hangs or failed.
        """
        if self._error is not None:
            raise StageLostError(self._error)

    @property
    def is_alive(self) -> bool:
        """Whether the job goes on."""
        return self._error is None and not self._closed.is_set()

    def get(self, waiting: queue.Queue) -> Any:
        """Next item of a queue that another thread fills, or ``StageLostError``."""
        while True:
            try:
                return waiting.get(timeout=0.2)
            except queue.Empty:
                self.check()

    def guard(self, work: Callable[[], None], name: str) -> None:
        """Run ``work`` in a thread; what it raises ends the job."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self.failed(error)

        thread = threading.Thread(target=run, daemon=True, name=name)
        self._threads.append(thread)
        thread.start()

    def failed(self, error: Exception) -> None:
        """Tell everybody why this rank cannot go on. Broken connections only raise suspicion: somebody else died."""
        if not self.is_alive or isinstance(error, StageLostError):
            return
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in BROKEN):
            self._is_suspicious = True
            self._over.wait(self._suspicious_s + 2.5)
        if self._error is None and not self._closed.is_set():
            text = " ".join(str(error).split())[:300]
            self._end(f"stage {self.rank} of {self.size} failed: {type(error).__name__}: {text}", tell=True)

    def close(self) -> None:
        """Wait until everything is sent, then stop watching."""
        try:
            while self._unsent and self._error is None:
                self._unsent.popleft()[0].wait(timedelta(seconds=10))
        except RuntimeError:
            self._end(f"stage {self.rank} of {self.size} was closed in the middle of a message", tell=True)
        self.abandon()

    def abandon(self) -> None:
        """Stop watching and beating at once."""
        self._closed.set()
        self._over.set()

    def join(self) -> None:
        """Wait for this rank's threads: one that is inside gloo must not see the interpreter go."""
        for thread in self._threads:
            thread.join(5)

    def _beat(self) -> None:
        count, heard = 0, {rank: (b"", time.monotonic()) for rank in range(self.size) if rank != self.rank}
        try:
            while not self._closed.wait(0.5) and self._error is None:
                count += 1
                self.store.set(f"beat/{self.rank}", str(count))
                if self.store.check(["failed"]):
                    self._end(self.store.get("failed").decode(), tell=False)
                for rank, (last, since_s) in heard.items():
                    beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
                    silent_s = time.monotonic() - since_s
                    if beat != last:
                        heard[rank] = beat, time.monotonic()
                    elif silent_s > (self._suspicious_s if self._is_suspicious else self._dead_after_s):
                        self._end(
                            f"stage {rank} of {self.size} has been silent for {silent_s:.0f} s (killed, out of memory "
                            "or cut off); the stream cannot go on, start it again",
                            tell=True,
                        )
        except Exception as error:  # the store lives with rank 0 or its launcher
            if not self._closed.is_set():
                self._end(f"stage 0 of {self.size} is gone ({type(error).__name__}); start again", tell=False)

    def _end(self, reason: str, *, tell: bool) -> None:
        if self._error is not None:
            return
        self._error = reason
        self._over.set()
        if tell and not self.store.check(["failed"]):
            self.store.set("failed", reason)
        logger.info("rank %d ends: %s", self.rank, reason)
        if self._on_death is not None:
            self._on_death(reason)


BROKEN = ("connection", "gloo", "socket", "broken pipe", "nccl", "timed out")
"""Words of the transports' errors when the other side is gone."""
