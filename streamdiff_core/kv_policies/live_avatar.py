"""Live Avatar's rolling sink: the sink is always ahead of the query (SEEDS §3.12)."""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff_core.kv_policies._registry import policy
from streamdiff_core.kv_policies._rolling import RollingPolicy


@policy("live_avatar")
@dataclass(frozen=True)
class LiveAvatarPolicy(RollingPolicy):
    """A sink that lies a fixed time in the future of the newest frame.

    The stream moves towards its sink instead of away from it; the distance never grows.

    Paper: Live Avatar, rolling sink frame mechanism (SEEDS §3.12).
    Training-free: runs, trained with corrupted history.
    Cost: the sink is rotated again in every chunk.
    Look for: identity and colours that stay for as long as one watches.
    Deviates: the sink is the first generated frame from the start (the paper: a reference image, replaced after the
        first clip); the distance counts from the newest frame of the chunk, not from its first one.
    """

    ahead_frames: int = 30
    """How far the sink sits in front of the newest frame."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.sink_frames < 1 or self.ahead_frames < 1:
            raise ValueError(
                f"live_avatar needs sink_frames >= 1 and ahead_frames >= 1, got {self.config.sink_frames} and "
                f"{self.ahead_frames}"
            )
        self._use(positions="ahead", ahead_frames=self.ahead_frames)
