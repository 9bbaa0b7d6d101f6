"""stage.py: what a rank holds, loads and sends; memory of the full-size models counted without allocating them."""

from __future__ import annotations

import pytest
import torch
from random_pipeline import RANDOM_PRESET, random_modules

from streamdiff_core.config import WAN_1_3B, WAN_14B, CacheConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import SinkPolicy
from streamdiff_core.parallel.block_scheduler import RankTimes, even_split
from streamdiff_core.parallel.stage import MicroBatch, Stage, StagePart
from streamdiff_core.weights import load_checkpoint, save_checkpoint

NUM_PARAMETERS = {"1.3b": (WAN_1_3B, 1_418_996_800), "14b": (WAN_14B, 14_288_491_584)}  # SPEC §13


def num_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_weights_and_cache_of_full_size_models_are_shared_out(name, size):
    """Every tensor is on one rank and none on two; cache and weights per rank fall as 1 / N but for the ends.

    Upstream: all weights on every rank (SPEC §6.1), so nothing falls.
    """
    config, num_parameters = NUM_PARAMETERS[name]
    with torch.device("meta"):
        whole = CausalWanTransformer(config)
    names = list(whole.state_dict())
    split, weights, caches = even_split(config.num_layers, size), [], []
    policy = SinkPolicy(CacheConfig())
    for rank in range(size):
        part = StagePart.of(split, rank)
        assert sum(map(part.covers, names)) < len(names)
        with torch.device("meta"):
            kept = part.keep(CausalWanTransformer(config))
        assert len(kept.state_dict()) == sum(map(part.covers, names))
        weights.append(num_bytes(kept.parameters()) // 4)
        stage = Stage(kept, split, rank, dtype=torch.bfloat16, device="meta")
        stage.new_cache(1, "sink", {}, {}, num_rows=2, tokens=1560)
        caches.append(stage.caches[1].nbytes)
    assert sum(weights) == num_parameters
    whole_cache = KVCache(config, policy, num_rows=2, tokens_per_frame=1560, dtype=torch.bfloat16, device="meta")
    assert sum(caches) == whole_cache.nbytes
    ends = num_bytes(p for n, p in whole.named_parameters() if not n.startswith("blocks")) // 4
    layer = (num_parameters - ends) / config.num_layers
    assert max(weights) <= (config.num_layers / size + 1) * layer + ends
    assert max(weights) / num_parameters < {2: 0.54, 4: 0.31, 8: 0.19}[size]


def test_a_rank_loads_only_its_tensors(tmp_path):
    """From a file of the whole model, checked as a whole; the other tensors never leave the meta device."""
    whole = random_modules(RANDOM_PRESET)[0]
    (file,) = save_checkpoint(whole, tmp_path / "model.safetensors")
    for rank in range(2):
        part = StagePart.of((1, 1), rank)
        with torch.device("meta"):
            model = CausalWanTransformer(RANDOM_PRESET.model).double()
        load_checkpoint(model, file, only=part.covers)
        loaded = {name for name, x in model.state_dict().items() if not x.is_meta}
        assert loaded == {name for name in whole.state_dict() if part.covers(name)}
        kept = part.keep(model)
        assert not any(p.is_meta for p in kept.parameters())
        assert torch.equal(kept.blocks[0].ffn[0].weight, whole.blocks[rank].ffn[0].weight)
    for name in whole.state_dict():
        assert sum(StagePart.of((1, 1), rank).covers(name) for rank in range(2)) == 1


def test_micro_batches_survive_json():
    batch = MicroBatch(
        shape=(1, 2, 6, 8, 8), dtype="float64", timesteps=((712.3456789012345, 1.0),), sigmas=((0.1, 0.2),),
        caches=(3,), cache_rows=(1,), frame_ids=((4, 5),), prompts=(0,), descriptors=([0.1, 0.2],), streams=(None,),
        chunk_idx=4,
    )  # fmt: skip
    import json

    assert MicroBatch.from_plain(json.loads(json.dumps(batch.to_plain()))) == batch


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def test_times_tell_layers_from_the_rest():
    """Median per layer, and what stays whatever the split: embed on the first rank, encode beside it, never decode."""
    from streamdiff_core.timing import StageTimer

    model = StagePart.of((2, 0), 0).keep(random_modules(RANDOM_PRESET)[0])
    stage, clock = Stage(model, (2, 0), 0, dtype=torch.float64, device="cpu"), Clock()
    assert stage.times() is None
    stage.timer = StageTimer(clock=clock)
    for layers_ms in (10, 90, 12):
        for name, ms in (("encode", 5), ("embed", 1), ("layers", layers_ms), ("decode", 400)):
            with stage.timer.stage(name):
                clock.now_s += ms / 1e3
    assert stage.times().layer_ms == pytest.approx(6) and stage.times().fixed_ms == pytest.approx(6)
    stage.move_layers((2, 0), None)  # nothing moves, but what was measured counts no more
    assert stage.times() is None
    assert RankTimes(layer_ms=1).fixed_ms == 0
