"""Work that takes the model only while no live stream needs it, step by step; a comparison in the app is such work.

The model's thread carries it out (`LiveEngine.work_in_pauses`): one step whenever no stream is ready, so a stream waits
for at most one step, about one chunk, and work waits for as long as streams keep the model busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from typing import Any

from streamdiff_core.pipeline import StreamPipeline

logger = logging.getLogger(__name__)


class PauseWork:
    """Steps to do, how far they are and what came of them; every attribute may be read from any thread.

    Args:
        begin: makes the steps, in the model's thread; what a step yields is shown as ``progress``, what the generator
            returns is the ``result``.
    """

    def __init__(self, begin: Callable[[StreamPipeline], Generator[Any, None, Any]]) -> None:
        self.progress: Any = None
        """What the latest step yielded."""
        self.result: Any = None
        """What the steps returned."""
        self.error: Exception | None = None
        """What ended them."""
        self.done = threading.Event()
        """Set when there is nothing more to come."""
        self.is_cancelled = False
        """Whether somebody asked to stop."""
        self._begin = begin
        self._steps: Generator[Any, None, Any] | None = None

    def cancel(self) -> None:
        """Stop before the next step."""
        self.is_cancelled = True

    def step(self, pipe: StreamPipeline | None) -> None:
        """Do one step, or end; called by the model's thread only."""
        try:
            if self.is_cancelled:
                self.end()
                return
            if pipe is None:
                raise RuntimeError("the model could not be loaded")
            if self._steps is None:
                self._steps = self._begin(pipe)
            self.progress = next(self._steps)
        except StopIteration as last:
            self.result = last.value
            self.done.set()
        except Exception as error:
            logger.info("work in pauses failed", exc_info=error)
            self.error = error
            self.done.set()

    def end(self) -> None:
        """Close the steps, finished or not; called by the model's thread only."""
        if self._steps is not None:
            self._steps.close()
        self.done.set()
