"""The cache holds the same bytes at frame 2,000 as at frame 0, in the same places, whatever the position
map."""

from __future__ import annotations

import pytest
import torch

from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import SinkPolicy
from streamdiff_core.rope import spatial_rotation, temporal_rotation

MODEL = ModelConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=1)
NUM_FRAMES = 2_000


@pytest.mark.parametrize("positions", ["absolute", "packed", "slots", "ahead", "wrap"])
def test_cache_of_two_thousand_frames(positions):
    config = CacheConfig(sink_frames=1, window_frames=2, positions=positions, adaptive_sink="paper")
    cache = KVCache(MODEL, SinkPolicy(config), num_rows=1, tokens_per_frame=2)
    stores = [x for group in (cache.k, cache.v, cache._k_time) for x in group]
    size, places = cache.nbytes, [x.data_ptr() for x in stores]
    assert size == sum(x.untyped_storage().nbytes() for x in stores)  # no hidden larger buffer
    k = torch.randn(2, 2, 4)
    descriptors = [torch.tensor(v).numpy() for v in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])]
    for frame in range(NUM_FRAMES):
        view = cache.begin(0, (frame,), descriptors[frame // 50 % 3])  # a new scene every 50 frames
        keys, _ = view.update(0, k, k)
        assert cache.nbytes == size
        assert len(keys) <= 3 * 2
    assert keys.untyped_storage().data_ptr() == cache.k[0].untyped_storage().data_ptr()  # a view, not a copy
    now = [x for group in (cache.k, cache.v, cache._k_time) for x in group]
    assert [x.data_ptr() for x in now] == places and len(now) == len(stores)
    table = cache.tables[0]
    assert len(table.frames) == len(table.is_sink) == 3 and len(table.descriptors) <= 3
    assert [len(row) for layer in cache._rotated_to for row in layer] == [3]


def test_kept_values_do_not_hold_their_forward_alive():
    """Storage is written in place: the chunk's own tensors, and any graph behind them, are free
    afterwards."""
    cache = KVCache(MODEL, SinkPolicy(CacheConfig(sink_frames=1, window_frames=2)), num_rows=1, tokens_per_frame=2)
    k = torch.randn(2, 2, 4)
    place = k.data_ptr()
    keys, values = cache.begin(0, (0,)).update(0, k, k)
    expected = values.clone()
    k.zero_()
    assert torch.equal(values, expected) and place not in {keys.data_ptr(), values.data_ptr()}


def test_shared_rotations_are_bounded():
    """Absolute positions make new multipliers for ever; the table of them must not grow with the stream."""
    for position in range(NUM_FRAMES):
        temporal_rotation((position,), (2, 0, 0), torch.float32, torch.device("cpu"))
    for rotation in (temporal_rotation, spatial_rotation):
        info = rotation.cache_info()
        assert info.maxsize is not None and info.currsize <= info.maxsize <= 1_024
