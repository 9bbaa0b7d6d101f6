"""Encoding and decoding on CUDA streams of their own, so that a GPU decodes one chunk while it denoises the next.

Denoising stays on the caller's stream. It waits for the encoder of its chunk, the decoder waits for it, and nothing
waits for a decoder but the host, one chunk later: ``push`` then returns the frames before. Memory that crosses from one
stream to another is not given away while the second still reads it. Off by default; not measured on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


class InTurn:
    """One stage after the other, where the caller is."""

    delay_chunks = 0
    """Chunks that are being decoded when ``push`` returns."""

    def stage(self, name: str, *inputs: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, work belongs to the stage ``encode`` or ``decode``; ``inputs`` come from the caller."""
        return contextlib.nullcontext()

    def hand_over(self, name: str, *outputs: Tensor) -> None:
        """What the caller does next comes after the stage and may read its outputs."""

    def fetch(self, x: Tensor) -> Callable[[], np.ndarray]:
        """Start copying to the host; the function returned waits for it."""
        host = x.cpu().numpy()
        return lambda: host


class StageStreams(InTurn):
    """A stream for ``encode`` and one for ``decode``, of one session."""

    delay_chunks = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {name: torch.cuda.Stream(device) for name in ("encode", "decode")}
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream(device))  # the weights are there

    @contextlib.contextmanager
    def stage(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """As ``InTurn.stage``; without inputs it waits for nothing of the caller's."""
        stream = self._streams[name]
        if inputs:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        for x in inputs:
            x.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def hand_over(self, name: str, *outputs: Tensor) -> None:
        """As ``InTurn.hand_over``."""
        caller = torch.cuda.current_stream(self._device)
        caller.wait_stream(self._streams[name])
        for x in outputs:
            x.record_stream(caller)

    def fetch(self, x: Tensor) -> Callable[[], np.ndarray]:
        """As ``InTurn.fetch``, to be called inside the stage."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> np.ndarray:
            arrived.synchronize()
            return host.numpy()

        return wait


def check_overlap(device: torch.device) -> None:
    """Refuse a device on which stages cannot overlap.

    Raises:
        ValueError: no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"stages overlap on a GPU, the model is on {device}; leave out --overlap-stages")
