"""What rank 0 holds of things that live on all ranks: a prompt, a forward under way, a stream's cache.

They take the place of ``PromptContext``, of a list of x0s and of ``KVCache`` in the sessions of a ring; ``RingEngine``
makes them.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from streamdiff_core.parallel.links import Parcel

if TYPE_CHECKING:
    from streamdiff_core.ring_engine import RingEngine


@dataclass(frozen=True, eq=False, slots=True)
class RingPrompt:
    """A prompt as rows of the ring carry it: each rank projects it for its own layers."""

    embedded: Tensor
    """[1, text_len, D]."""

    @property
    def nbytes(self) -> int:
        """Bytes held here."""
        return self.embedded.numel() * self.embedded.element_size()


class Ticket:
    """A forward under way."""

    def __init__(self, engine: RingEngine, num_rows: int) -> None:
        self._engine, self._missing = engine, num_rows
        self._x0s: list[Tensor | None] = [None] * num_rows
        self._arrivals: queue.Queue = queue.Queue()

    def arrive(self, members: Sequence[int], x0: Parcel) -> None:
        """Called when a batch is back: ``x0`` a parcel [B, F, C, h, w] for these rows."""
        self._arrivals.put((members, x0))

    @property
    def is_done(self) -> bool:
        """Whether all rows are back."""
        while self._missing and not self._arrivals.empty():
            self._take(self._arrivals.get())
        return not self._missing

    def wait(self) -> list[Tensor]:
        """x0 [F, C, h, w] of each row, in order."""
        while self._missing:
            self._take(self._engine.links.get(self._arrivals))
        return self._x0s

    def _take(self, arrival: tuple[Sequence[int], Parcel]) -> None:
        members, x0 = arrival
        for i, row in zip(members, x0.open(), strict=True):
            self._x0s[i] = row
        self._missing -= len(members)


class SharedCache:
    """A stream's cache as rank 0 sees it: what it is told to do, every rank does between the same two forwards."""

    def __init__(self, engine: RingEngine, number: int) -> None:
        self._engine, self.number = engine, number

    def __getattr__(self, name: str) -> Any:
        """Tables, policy, sizes: those of the layers on rank 0."""
        return getattr(self._engine.stage.caches[self.number], name)

    def fork(self, src: int, dst: Sequence[int]) -> None:
        """Copy row ``src`` onto rows ``dst``."""
        self._call("fork", src, list(dst))

    def clear(self) -> None:
        """Forget everything."""
        self._call("clear")

    def keep_recent(self, num_frames: int, rows: Sequence[int] | None = None) -> None:
        """Keep sinks and the newest frames of some rows."""
        self._call("keep_recent", num_frames, None if rows is None else list(rows))

    def take_over(self, other: SharedCache, row: int) -> None:
        """Fill all rows with what one row of another cache holds."""
        self._call("take_over", {"cache": other.number}, row)

    def _call(self, method: str, *arguments: Any) -> None:
        self._engine.command("call_cache", number=self.number, method=method, arguments=list(arguments))
