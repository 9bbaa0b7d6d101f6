"""What a viewer may ask for: sides, mode, and a cache that fits the size."""

from __future__ import annotations

import pytest

from streamdiff_core.config import CacheConfig
from streamdiff_core.live_limits import check_cache, check_shape
from streamdiff_core.stream_options import StreamOptions


@pytest.mark.parametrize("shape", [{}, {"width": 64}, {"height": 1024, "width": 64, "mode": "v2v"}])
def test_shapes_that_are_let_through(shape):
    check_shape(shape)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"width": 63}, "width must be a whole number from 64 to 1024"),
        ({"width": 64, "height": 1025}, "height must be"),
        ({"height": "256"}, "height must be"),
        ({"width": 256.0}, "width must be"),
        ({"width": None}, "width must be"),
        ({"mode": "t2v"}, "has the mode v2v"),
    ],
)
def test_shapes_that_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        check_shape(shape)


@pytest.mark.parametrize(
    ("width", "height", "most"),
    [(256, 256, 64), (512, 512, 64), (1024, 512, 32), (1024, 1024, 16)],  # 64 frames of 512x512, fewer when larger
)
def test_a_cache_has_room_for_so_many_frames_of_a_size(width, height, most):
    def options(window_frames):
        cache = CacheConfig(sink_frames=1, window_frames=window_frames)
        return StreamOptions(seed=0, steps=1, width=width, height=height, cache=cache)

    check_cache(options(most - 1))
    with pytest.raises(ValueError, match=f"{width}x{height} keeps at most {most} latent frames, not {most + 1}; lower"):
        check_cache(options(most))


def test_what_the_policy_keeps_besides_counts_too():
    cache = CacheConfig(sink_frames=1, window_frames=3)
    options = StreamOptions(seed=0, steps=1, policy="frame_routing", policy_options={"bank_frames": 100}, cache=cache)
    with pytest.raises(ValueError, match="at most 64 latent frames"):
        check_cache(options)
