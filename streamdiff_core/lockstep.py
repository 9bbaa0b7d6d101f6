"""Continuous batching: works of several streams in lockstep, so that their forwards become one.

A *work* is a generator: it hands out the rows it needs computed next and is sent their x0, until it returns. Alone
(`run_alone`) each of its forwards is a call of its own; together, every round runs the rows of all works in one call.
A work also hands out no rows where a stage ends (everything encoded, nothing decoded yet), so that works keep step.
A row that fails takes only its own work down. Who works together is decided elsewhere (``planner``).
Source: SPEC §6.5; the released code runs one stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from streamdiff_core.kv_cache import KVCache
from streamdiff_core.types import RowOp

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Rows = list[tuple[KVCache, RowOp]]
Work = Generator[Rows, list[Tensor], Result]
"""Yields rows, none at the end of a stage; is sent the x0 of each; returns its result."""
Forward = Callable[[Rows], list[Tensor]]
"""``Engine.forward``."""


def run_alone(work: Work[Result], forward: Forward) -> Result:
    """The result of one work, each of its forwards by itself."""
    x0s = None
    try:
        while True:
            rows = work.send(x0s)
            x0s = forward(rows) if rows else []
    except StopIteration as end:
        return end.value


@dataclass(slots=True, eq=False)
class _Part:
    """One work on its way."""

    work: Work[Any]
    x0s: list[Tensor] | None = None
    rows: Rows = field(default_factory=list)
    latent_frames: int = 0
    """Of its chunk, known from its first forward on."""
    encode_ms: float = 0.0
    result: Any = None
    is_done: bool = False

    def end(self, result: Any) -> None:
        """It returned this, or failed with it."""
        self.result, self.is_done, self.rows = result, True, []

    def fail(self, error: Exception) -> None:
        """Let the work clean up after an error of its rows."""
        try:
            self.work.throw(error)
        except StopIteration as end:
            self.end(end.value)
        except Exception as its_own:
            self.end(its_own)


class Lockstep:
    """Runs works together.

    Args:
        forward: computes rows.
        observe: told (stage, rows, latent frames, ms) of every encode, denoise and decode, as ``LatencyModel.observe``.
        on_split: told why a joint forward failed; its works then go on one by one for this round.
        sync: waits for the device, so that a time is that of the work and not of its start.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        observe: Callable[[str, int, int, float], None] = lambda *_: None,
        on_split: Callable[[Exception], None] = lambda error: None,
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self._forward, self._observe, self._on_split, self._sync = forward, observe, on_split, sync

    def run(self, works: Sequence[Work[Any]]) -> list[Any]:
        """Result of each work, or the exception that ended it."""
        parts = [_Part(work) for work in works]
        while going := [part for part in parts if not part.is_done]:
            for part in going:
                self._resume(part)
            asking = [part for part in going if part.rows]
            if asking:
                self._compute(asking)
        return [part.result for part in parts]

    def _resume(self, part: _Part) -> None:
        """Run a work up to its next rows, the end of a stage, or its end."""
        is_first, is_decode = part.x0s is None, part.latent_frames > 0 and part.x0s == []
        start_s = time.perf_counter()
        try:
            part.rows = part.work.send(part.x0s)
        except StopIteration as end:
            part.end(end.value)
        except Exception as error:
            part.end(error)
            return
        part.x0s = []
        if is_decode or (is_first and not part.rows and not part.is_done):
            self._sync()
            took_ms = 1e3 * (time.perf_counter() - start_s)
            if is_decode:
                self._observe("decode", 1, part.latent_frames, took_ms)
            else:
                part.encode_ms = took_ms

    def _compute(self, parts: list[_Part]) -> None:
        """One forward over the rows of all; where it fails, each part's own, from the same cache tables."""
        rows = [row for part in parts for row in part.rows]
        before = [cache.tables[row.cache_row].copy() for cache, row in rows] if len(parts) > 1 else []
        start_s = time.perf_counter()
        try:
            x0s = iter(self._forward(rows))
            self._sync()
        except Exception as error:
            if len(parts) == 1:
                parts[0].fail(error)
                return
            logger.warning("a forward of %d streams failed, now one by one: %s", len(parts), error)
            self._on_split(error)
            for (cache, row), table in zip(rows, before, strict=True):
                cache.tables[row.cache_row] = table
            for part in parts:
                self._compute([part])
            return
        sizes = {row.xt.shape[0] for _, row in rows}
        if len(sizes) == 1:
            self._observe("denoise", len(rows), *sizes, 1e3 * (time.perf_counter() - start_s))
        for part in parts:
            part.x0s = [next(x0s) for _ in part.rows]
            if not part.latent_frames:
                part.latent_frames = part.rows[0][1].xt.shape[0]
                if part.encode_ms:
                    self._observe("encode", 1, part.latent_frames, part.encode_ms)
