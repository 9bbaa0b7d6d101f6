"""Border conversions: hand-written pixels, the crop window, and the size rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamdiff_core.frames import fit_size, frames_to_tensor, resize_and_crop, tensor_to_frames


def solid(height: int, width: int, value: int = 0) -> np.ndarray:
    return np.full((2, height, width, 3), value, dtype=np.uint8)


def test_tensor_values_and_axes() -> None:
    frames = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    frames[1, 2, 5] = (255, 0, 51)
    x = frames_to_tensor(frames)
    assert x.shape == (1, 2, 3, 4, 6) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, 1, :, 2, 5], torch.tensor([1.0, -1.0, -0.6]))
    assert (x[0, 0] == -1).all()


def test_every_level_survives_the_round_trip() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(tensor_to_frames(frames_to_tensor(frames)), frames)


def test_tensor_to_frames_rounds_and_clamps() -> None:
    # -1 + 0.6/127.5 is level 0.6: truncation gives 0. 1.5 is beyond white: unclamped it wraps.
    x = torch.tensor([-1 + 0.6 / 127.5, 1.5, -7.0]).reshape(1, 1, 3, 1, 1)
    assert tensor_to_frames(x).reshape(-1).tolist() == [1, 255, 0]
    assert tensor_to_frames(x.to(torch.bfloat16)).dtype == np.uint8


def test_mirrored_and_read_only_frames(recwarn: pytest.WarningsRecorder) -> None:
    frames = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(1, 4, 6, 3)
    frames.setflags(write=False)
    mirrored = frames_to_tensor(frames[:, :, ::-1])
    torch.testing.assert_close(mirrored, frames_to_tensor(frames).flip(-1))
    assert not recwarn.list  # torch warns about views of read-only memory


def test_crop_takes_the_centre() -> None:
    frames = solid(100, 300)
    frames[:, :, 100:200] = 200  # the central square, and nothing else
    out = resize_and_crop(frames, 64, 64)
    assert out.shape == (2, 64, 64, 3) and (out == 200).all()
    tall = resize_and_crop(frames.transpose(0, 2, 1, 3).copy(), 64, 64)
    assert (tall == 200).all()


def test_shrinking_averages_areas() -> None:
    checker = np.indices((192, 192)).sum(0) % 2 * 255
    frames = np.repeat(checker[None, :, :, None].astype(np.uint8), 3, axis=3)
    out = resize_and_crop(frames, 64, 64)
    # 4 or 5 white pixels of 9: 113.3 or 141.7. Linear or cubic sampling takes the middle one: 0 or 255.
    assert set(np.unique(out)) <= {113, 142}


def test_growing_and_same_size() -> None:
    assert resize_and_crop(solid(64, 65, 9), 200, 100).shape == (2, 100, 200, 3)
    same = solid(64, 64)
    assert resize_and_crop(same, 64, 64) is same
    assert resize_and_crop(same[:0], 32, 48).shape == (0, 48, 32, 3)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), "uint8, got float32"),
        (np.zeros((8, 8, 3), np.uint8), r"got \[8, 8, 3\]"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"got \[1, 8, 8, 4\]"),
        (torch.zeros(1, 8, 8, 3), "numpy array"),
    ],
)
def test_wrong_frames_are_named(frames: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        resize_and_crop(frames, 64, 64)
    with pytest.raises(ValueError, match=text):
        frames_to_tensor(frames)


def test_wrong_tensor_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[2, 1, 3, 4, 4\]"):
        tensor_to_frames(torch.zeros(2, 1, 3, 4, 4))


def test_fit_size_by_hand() -> None:
    assert fit_size(1920, 1080, 832 * 480) == (848, 480)  # 842.6 × 474.0 → nearest 16
    assert fit_size(1080, 1920, 832 * 480) == (480, 848)
    assert fit_size(512, 512, 256 * 256) == (256, 256)
    assert fit_size(4000, 64, 256 * 256) == (2016, 64)  # 2023.9 × 32.4; the short side is lifted to 64
    with pytest.raises(ValueError, match="at least 1"):
        fit_size(0, 10, 100)


@given(st.integers(64, 4000), st.integers(64, 4000), st.sampled_from([8, 16, 48]))
def test_fit_size_is_in_steps_and_keeps_the_shape(width: int, height: int, multiple: int) -> None:
    fitted_width, fitted_height = fit_size(width, height, 256 * 256, multiple)
    assert fitted_width % multiple == fitted_height % multiple == 0
    assert min(fitted_width, fitted_height) >= 64
    assert (fitted_width - fitted_height) * (width - height) >= 0
