"""StreamDiffusionV2, readable: live, prompt-driven video-to-video with a causal Wan-style diffusion transformer.

from streamdiff_core import StreamPipeline
session = StreamPipeline.from_preset("tiny").start("oil painting")
restyled = session.push(frames)  # uint8 [T, H, W, 3] in, whatever became ready out
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamdiff_core.config import CacheConfig, ModelConfig, Preset, get_preset, list_presets
from streamdiff_core.types import CheckpointError, StreamClosedError, VideoReadError

if TYPE_CHECKING:
    from streamdiff_core.drift import Drift, DriftMeter
    from streamdiff_core.live_engine import LiveEngine, ServerFullError
    from streamdiff_core.live_events import LiveReply
    from streamdiff_core.live_pauses import PauseWork
    from streamdiff_core.live_stream import LiveStream
    from streamdiff_core.pipeline import StreamPipeline
    from streamdiff_core.recipe import OptionEvent, PromptEvent, Recipe
    from streamdiff_core.session import StreamSession
    from streamdiff_core.stream_options import StreamOptions, StreamStats
    from streamdiff_core.weights import load_checkpoint

__version__ = "0.1.0"

_LAZY = {
    "Drift": "drift",
    "DriftMeter": "drift",
    "LiveEngine": "live_engine",
    "LiveReply": "live_events",
    "LiveStream": "live_stream",
    "PauseWork": "live_pauses",
    "ServerFullError": "live_engine",
    "OptionEvent": "recipe",
    "PromptEvent": "recipe",
    "Recipe": "recipe",
    "StreamPipeline": "pipeline",
    "StreamSession": "session",
    "StreamOptions": "stream_options",
    "StreamStats": "stream_options",
    "load_checkpoint": "weights",
}

__all__ = [
    "CacheConfig",
    "CheckpointError",
    "Drift",
    "DriftMeter",
    "LiveEngine",
    "LiveReply",
    "LiveStream",
    "ModelConfig",
    "OptionEvent",
    "PauseWork",
    "Preset",
    "PromptEvent",
    "Recipe",
    "ServerFullError",
    "StreamClosedError",
    "StreamOptions",
    "StreamPipeline",
    "StreamSession",
    "StreamStats",
    "VideoReadError",
    "get_preset",
    "list_presets",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import the heavy parts on first use, so that ``import streamdiff_core`` is quick."""
    if name in _LAZY:
        return getattr(import_module(f"streamdiff_core.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'streamdiff_core' has no attribute {name!r}")
