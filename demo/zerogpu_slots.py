"""Memory shared between ZeroGPU's worker and the web process: one slot per visitor, with newest frame and wishes.

Slots must be made before a worker is forked: it sees only memory that existed then.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np

from streamdiff_core.frames import resize_and_crop

PROMPT_BYTES = 600
UNUSED_S = 60.0
"""A page that did nothing for so long gives its slot to the next when all are lent."""


@dataclass(slots=True)
class Slot:
    """The newest frame and the wishes of one viewer, in memory shared between processes."""

    side: int
    pixels: Any = field(init=False)
    count: Any = field(init=False)
    prompt: Any = field(init=False)
    noise_scale: Any = field(init=False)

    def __post_init__(self) -> None:
        self.pixels = multiprocessing.Array("B", self.side * self.side * 3)
        self.count = multiprocessing.Value("q", 0)
        self.prompt = multiprocessing.Array("c", PROMPT_BYTES)
        self.noise_scale = multiprocessing.Value("d", 0.0)

    def push(self, frame: np.ndarray) -> None:
        """Newest wins: uint8 [H, W, 3] in place of the one before."""
        small = resize_and_crop(np.ascontiguousarray(frame[None, ..., :3]), self.side, self.side)[0]
        with self.pixels.get_lock():
            np.frombuffer(self.pixels.get_obj(), np.uint8)[:] = small.ravel()
            self.count.value += 1

    def newest(self) -> tuple[int, np.ndarray]:
        """(frames pushed so far, the newest one [side, side, 3])."""
        with self.pixels.get_lock():
            pixels = np.frombuffer(self.pixels.get_obj(), np.uint8).reshape(self.side, self.side, 3).copy()
            return self.count.value, pixels

    def ask(self, prompt: str, noise_scale: float) -> None:
        """Settings for the next chunk."""
        self.prompt.value = prompt.encode()[: PROMPT_BYTES - 1].decode(errors="ignore").encode()
        self.noise_scale.value = noise_scale

    def clear(self) -> None:
        """Nothing of one viewer is left for the next."""
        with self.pixels.get_lock():
            np.frombuffer(self.pixels.get_obj(), np.uint8)[:] = 0
            self.count.value = 0
        self.prompt.raw = bytes(PROMPT_BYTES)


class SlotPool:
    """A fixed number of slots, each lent to one page by its session hash."""

    def __init__(self, num_slots: int, side: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots = [Slot(side) for _ in range(num_slots)]
        self._owners: dict[str, tuple[int, float]] = {}  # slot, when it was last used
        self._clock, self._lock = clock, threading.Lock()

    def take(self, owner: str) -> int:
        """Index of the owner's slot, a free one at first.

        Raises:
            gr.Error: all are lent.
        """
        with self._lock:
            if owner not in self._owners:
                self._owners[owner] = self._free_slot(), 0.0
            index = self._owners[owner][0]
            self._owners[owner] = index, self._clock()
            return index

    def give_back(self, owner: str) -> None:
        """The page is gone."""
        with self._lock:
            if owner in self._owners:
                self.slots[self._owners.pop(owner)[0]].clear()

    def _free_slot(self) -> int:
        lent = {index for index, _ in self._owners.values()}
        if len(lent) == len(self.slots):  # perhaps a last frame came in after its page had left
            owner, (index, used_s) = min(self._owners.items(), key=lambda item: item[1][1])
            if self._clock() - used_s < UNUSED_S:
                raise gr.Error("The server is full. Try again in a minute, or duplicate this Space.")
            del self._owners[owner]
            self.slots[index].clear()
            return index
        return min(set(range(len(self.slots))) - lent)
