"""Labels of heads: the ratio by hand, and labels that a stream can use."""

import math

import pytest
import torch
from policy_script import HEAD_DIM, HEADS, MODEL, Feed, run, singles, turned
from random_pipeline import moving_frames, random_pipeline, stream
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_policies import label_heads
from streamdiff_core.kv_policies._head_labels import RecencyProfile


def test_ratio_by_hand():
    """sink 1 + window 5, frame 7: 0 | 3 … 7 at 0 … 5. r = mass on 4 … 7 over mass on 3 … 7."""
    feed, policy = Feed(), RecencyProfile(CacheConfig(sink_frames=1, window_frames=5, positions="packed"))
    run(policy, singles(0, 7), feed)
    assert {len(r) for r in policy.ratios.values()} == {3}  # full from frame 5 on
    for layer in range(MODEL.num_layers):
        for h in range(HEADS):
            q = turned(feed("q", 7, layer), 5)[:, h]
            keys = torch.cat([turned(feed("k", f, layer), at)[:, h] for at, f in enumerate((0, 3, 4, 5, 6, 7))])
            mass = (q @ keys.T / math.sqrt(HEAD_DIM)).softmax(-1).sum(0).view(6, -1).sum(1)
            assert_close(
                policy.ratios[layer][-1][h].item(), (mass[2:].sum() / mass[1:].sum()).item(), rtol=1e-5, atol=0
            )


def test_labels_of_a_model():
    pipe, clip = random_pipeline(), moving_frames(61)
    assert label_heads(pipe, "pencil", clip, threshold=0.0) == [[], []]
    assert label_heads(pipe, "pencil", clip, threshold=1.1) == [[0, 1], [0, 1]]
    labels = label_heads(pipe, "pencil", clip, threshold=0.6)
    cache = CacheConfig(sink_frames=1, window_frames=4)
    session = pipe.start("pencil", policy="forcing_kv", policy_options={"dynamic_heads": labels}, cache=cache)
    assert len(stream(session, clip)) == 61


def test_a_clip_that_is_too_short():
    with pytest.raises(ValueError, match="need more than 10 latent frames to label heads"):
        label_heads(random_pipeline(), "pencil", moving_frames(25))
