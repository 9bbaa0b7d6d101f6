"""What one viewer of a live server may ask for, so that nobody takes all memory and time.

``stream_options`` says what can work at all; these limits are narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamdiff_core.kv_policies import make_policy
from streamdiff_core.stream_options import StreamOptions

MIN_SIDE_PX, MAX_SIDE_PX = 64, 1024
"""Shortest and longest side of the output."""
MAX_CACHE_FRAMES, ROOMY_PX = 64, 512 * 512
"""Latent frames of up to so many pixels that a cache may keep, fewer of larger ones."""


def check_shape(shape: Mapping[str, Any]) -> None:
    """Refuse a size or a mode that no live stream has; what is not given is not looked at.

    Raises:
        ValueError: with what there may be.
    """
    for name in ("width", "height"):
        side = shape.get(name, MIN_SIDE_PX)
        if not (isinstance(side, int) and MIN_SIDE_PX <= side <= MAX_SIDE_PX):
            raise ValueError(f"{name} must be a whole number from {MIN_SIDE_PX} to {MAX_SIDE_PX}")
    if shape.get("mode", "v2v") != "v2v":
        raise ValueError("a live stream has the mode v2v")


def check_cache(options: StreamOptions) -> None:
    """Refuse a cache that would leave too little for others.

    Raises:
        ValueError: with how much there may be.
    """
    kept = make_policy(options.policy, options.cache, options.policy_options).num_slots
    most = min(MAX_CACHE_FRAMES, MAX_CACHE_FRAMES * ROOMY_PX // (options.width * options.height))
    if kept > most:
        raise ValueError(
            f"the cache of a live stream of {options.width}x{options.height} keeps at most {most} latent frames, not "
            f"{kept}; lower window_frames, sink_frames or what the policy keeps besides"
        )
