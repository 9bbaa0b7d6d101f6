"""Plain sliding window: what every other policy is measured against (SEEDS §3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy


@policy("sliding_window")
@dataclass(frozen=True)
class SlidingWindowPolicy(RollingPolicy):
    """Only the most recent frames, no sink.

    The slots that ``CacheConfig`` gives to sinks go to the window, so that a comparison is one of equal memory.

    Paper: Self Forcing, CausVid (SEEDS §3.1).
    Training-free: yes, beyond the trained horizon quality decays.
    Cost: none.
    Look for: colours and style that drift over minutes, nothing that ties the stream to its beginning.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._use(sink_frames=0, window_frames=self.config.cache_frames)
