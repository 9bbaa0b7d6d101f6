"""The stand-in model must really hand frames through and fail as asked, else the browser tests prove nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.browser import marker
from tests.browser.transparent import transparent_pipeline


def test_every_frame_comes_back_with_its_code():
    pipe = transparent_pipeline()
    frames = np.stack([marker.stamp(np.full((256, 256, 3), 90, np.uint8), 5, i) for i in range(30)])
    with pipe.start("anything") as session:
        out = np.concatenate([session.push(frames), session.flush()])
    assert [marker.read(frame) for frame in out] == [(5, i) for i in range(30)]


def test_failures_come_with_their_prompt_only():
    pipe = transparent_pipeline()
    frames = np.zeros((5, 256, 256, 3), np.uint8)
    for prompt, error in [("out of memory", torch.OutOfMemoryError), ("worker crash", SystemExit)]:
        with pytest.raises(error):
            pipe.start(prompt).push(frames)
    assert len(pipe.start("something else").push(frames)) == 5
