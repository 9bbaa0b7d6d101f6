"""The line in front of the model: who comes in at once, who waits at which place, who is turned away with the numbers.

The decision is ``admission``'s; kept here are the waiting streams, in order, and how long streams stay. Without rules
there are only places and nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streamdiff_core.admission import Admission, AdmissionOptions, admit
from streamdiff_core.live_turns import Turns, newcomer_view

if TYPE_CHECKING:
    from streamdiff_core.live_stream import LiveStream
    from streamdiff_core.pipeline import StreamPipeline

TELL_EVERY_S = 1.0


class ServerFullError(RuntimeError):
    """All places are taken."""


class Line:
    """Streams that wait.

    Args:
        max_streams: places inside.
        rules: None: no line, and a place is all it takes to come in.
    """

    def __init__(self, max_streams: int, rules: AdmissionOptions | None, *, clock: Callable[[], float]) -> None:
        self.max_streams = max_streams
        self.waiting: list[LiveStream] = []
        self._rules = rules and replace(rules, max_streams=max_streams)
        self._clock, self._told_s, self._stays_s = clock, 0.0, []

    def enter(
        self, stream: LiveStream, inside: Sequence[LiveStream], turns: Turns, pipe: StreamPipeline | None
    ) -> bool:
        """True: comes in at once; False: waits.

        Raises:
            ServerFullError: neither.
        """
        if self._rules is None:
            if len(inside) >= self.max_streams:
                raise ServerFullError(f"all {self.max_streams} places are taken")
            return True
        answer = self._ask(stream, inside, turns, pipe, len(self.waiting))
        if answer.verdict == "refuse":
            raise ServerFullError(answer.sentence)
        if answer.verdict == "wait":
            self.waiting.append(stream)
            self._tell(stream, answer)
        return answer.verdict == "accept"

    def move_up(self, inside: list[LiveStream], turns: Turns, pipe: StreamPipeline | None) -> None:
        """Let in whoever is first, as long as there is room; tell the others where they stand now and then."""
        while self.waiting:
            answer = self._ask(self.waiting[0], inside, turns, pipe, 0)
            if answer.verdict != "accept":
                break
            inside.append(self.waiting.pop(0))
            inside[-1].opened_s = self._clock()  # its time begins now
            self._told_s = 0.0
        if self._clock() - self._told_s >= TELL_EVERY_S:
            self._told_s = self._clock()
            for number, stream in enumerate(self.waiting):
                self._tell(stream, self._ask(stream, inside, turns, pipe, number))

    def note_stay(self, seconds: float) -> None:
        """A stream left after so long; estimates use the mean of the latest."""
        if self._rules is not None:
            self._stays_s = [*self._stays_s, seconds][-32:]
            self._rules = replace(self._rules, mean_stay_s=max(1.0, sum(self._stays_s) / len(self._stays_s)))

    def _ask(
        self, stream: LiveStream, inside: Sequence[LiveStream], turns: Turns, pipe: StreamPipeline | None, ahead: int
    ) -> Admission:
        views = [s.promised_view() or newcomer_view(s, pipe) for s in inside]
        options = turns.planner_options(inside)
        return admit(newcomer_view(stream, pipe), views, turns.model, options, self._rules, num_waiting=ahead)

    def _tell(self, stream: LiveStream, answer: Admission) -> None:
        position = answer.position or self.waiting.index(stream) + 1
        place = {"position": position, "estimate_s": answer.estimate_s}
        stream.emit({"type": "stats", "waiting": place, "recording": None})
