"""Attention maps: the probabilities that the stream's own attention used, and no trace left in the stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_pipeline import moving_frames, random_pipeline
from torch.testing import assert_close

from streamdiff_core.attention_maps import AttentionMap, attention_maps


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


def watched_stream(pipe, num_chunks=9, **options):
    options = (
        dict(steps=1, schedule="sequential", cache=replace(pipe.preset.cache, sink_frames=1, window_frames=3)) | options
    )
    session = pipe.start("pencil", **options)
    per_chunk = 4 * options.get("latent_frames_per_chunk", 1)
    frames = moving_frames(per_chunk * num_chunks - 3)
    session.push(frames)
    return session, frames


def test_probabilities_are_those_the_stream_used(pipe):
    """They must lead from the cached values to what the stream's own fused attention handed on, in every layer."""
    handed_on = {}
    hooks = [
        block.self_attn.o.register_forward_pre_hook(lambda _, args, i=i: handed_on.__setitem__(i, args[0].clone()))
        for i, block in enumerate(pipe.transformer.blocks)
    ]
    session, _ = watched_stream(pipe)
    for hook in hooks:
        hook.remove()
    maps = attention_maps(session)
    assert sorted(maps) == sorted(handed_on) == list(range(session.cache.model.num_layers))
    for layer, seen in maps.items():
        values = session.cache.v[layer][0].flatten(0, 1)  # [N * P, n, d]
        out = torch.einsum("nlm,mnd->lnd", seen.probs.to(values.dtype), values).flatten(1)
        assert_close(out, handed_on[layer][0], rtol=0, atol=1e-5)  # probabilities are float32


def test_frames_roles_and_shares(pipe):
    """Nine chunks, one sink, a window of three: slot 0 keeps frame 0; frames 4 … 8 took slots 1, 2, 3, 1, 2."""
    session, _ = watched_stream(pipe)
    seen = attention_maps(session, [1])[1]
    assert seen.frames == (0, 7, 8, 6) and seen.roles == ("sink", "window", "window", "window")
    assert seen.query_frames == (8,) and seen.probs.shape[1] == seen.tokens_per_frame
    assert_close(seen.per_frame.sum(1), torch.ones(len(seen.probs)))
    assert seen.share("sink") + seen.share("window") + seen.share("query") == pytest.approx(1, abs=1e-5)
    assert seen.share("sink") == pytest.approx(seen.probs[:, :, : seen.tokens_per_frame].sum(2).mean().item(), abs=1e-6)


def test_shares_by_hand():
    """Two tokens a frame, sink 0 and window 5; the chunk is frame 6 and looks 10 %, 30 % and 60 %."""
    probs = torch.tensor([[[0.05, 0.05, 0.2, 0.1, 0.4, 0.2], [0.1, 0.0, 0.0, 0.3, 0.0, 0.6]]])
    seen = AttentionMap(
        probs=probs, frames=(0, 5, 6), roles=("sink", "window", "window"), query_frames=(6,), tokens_per_frame=2
    )
    assert_close(seen.per_frame, torch.tensor([[0.1, 0.3, 0.6]]))
    assert [round(seen.share(role), 6) for role in ("sink", "window", "query", "memory")] == [0.1, 0.3, 0.6, 0.0]


@pytest.mark.parametrize("schedule", ["sequential", "stream_batch"])
def test_looking_changes_nothing(pipe, schedule):
    options = dict(steps=2, schedule=schedule)
    (looked, frames), (plain, _) = watched_stream(pipe, **options), watched_stream(pipe, **options)
    for row in range(looked.cache.num_rows):
        attention_maps(looked, cache_row=row)
    assert (
        looked.push(frames[:8]) == plain.push(frames[:8])
    ).all() and looked.cache.describe() == plain.cache.describe()


def test_what_cannot_be_watched(pipe):
    with pytest.raises(ValueError, match="push at least one chunk"):
        attention_maps(pipe.start("pencil"))
    session, _ = watched_stream(pipe, policy="temp_cache")
    with pytest.raises(ValueError, match="policy='sink'"):
        attention_maps(session)
