"""metrics.py: values written by hand, known motion, and the upstream defect reproduced on purpose."""

import math

import numpy as np
import pytest
import torch

from streamdiff_core import metrics

STILL = np.zeros((20, 24, 2), dtype=np.float32)


def flat(*values: int, size: int = 16) -> np.ndarray:
    """Grey frames uint8 [T, size, size, 3]."""
    return np.stack([np.full((size, size, 3), value, dtype=np.uint8) for value in values])


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random picture, uint8 [H, W, 3]."""
    import cv2

    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def panning(num_frames: int, step: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """A window that moves `step` pixels to the right per frame: the content moves left."""
    wide = texture(size, size + step * num_frames, seed)
    return np.stack([wide[:, i * step : i * step + size] for i in range(num_frames)])


def test_psnr_by_hand():
    a, b = flat(100), flat(110)
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 100))
    assert metrics.psnr(a / 255.0, b / 255.0) == pytest.approx(metrics.psnr(a, b), abs=1e-4)
    assert metrics.psnr(a, a) == math.inf
    assert metrics.psnr(flat(0), flat(255)) == pytest.approx(0)  # wrap-around would read 48 dB
    assert metrics.psnr(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(metrics.psnr(a, b))
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.psnr(a, b[:, :8])


def test_flicker_counts_only_where_the_input_is_still():
    source, output = flat(50, 50, 50), flat(50, 50, 50)
    source[1, :8] = 200  # upper half moves, twice
    output[1] += 4
    output[1, :8] = 0  # whatever the output does there
    assert metrics.flicker(output, source) == pytest.approx(4)
    assert metrics.flicker(flat(9, 5), flat(0, 2)) == pytest.approx(4)  # change of 2 is still; sign does not matter
    assert math.isnan(metrics.flicker(flat(9, 5), flat(0, 3)))


def test_warp_error_of_a_known_translation_is_zero_and_without_flow_is_not():
    video = panning(4, step=3, size=24)[:, :20]
    # Content moves left by 3: forward flow −3, backward flow +3 in x.
    flow = [(STILL + (-3, 0), STILL + (3, 0))] * 3
    flow = [(f.astype(np.float32), b.astype(np.float32)) for f, b in flow]
    assert metrics.warp_error(video, video, flow) == pytest.approx(0, abs=1e-3)
    assert metrics.warp_error(video, video, [(STILL, STILL)] * 3) > 5
    wrong_sign = [(b, f) for f, b in flow]
    assert metrics.warp_error(video, video, wrong_sign) > 5


def test_warp_error_interpolates_between_pixels():
    ramp = np.repeat(np.arange(24, dtype=np.float32)[None, :, None] / 255, 20, axis=0).repeat(3, axis=2)
    video = np.stack([ramp, ramp + np.float32(0.25 / 255)])  # the ramp moved left by a quarter pixel
    quarter = np.float32([0.25, 0])
    assert metrics.warp_error(video, video, [(STILL - quarter, STILL + quarter)]) == pytest.approx(0, abs=1e-4)
    assert metrics.warp_error(video, video, [(STILL, STILL)]) == pytest.approx(0.25, abs=1e-4)


def test_warp_error_with_estimated_flow():
    """DIS on a pan of 3 pixels: an output that moves along scores low, one that does not scores high."""
    source = panning(4, step=3)
    restyled = 255 - source
    assert metrics.warp_error(restyled, source) < 2
    frozen = np.repeat(restyled[:1], 4, axis=0)
    assert metrics.warp_error(frozen, source) > 5 * metrics.warp_error(restyled, source)
    flickering = np.clip(restyled.astype(int) + np.array([0, 10, 0, 10])[:, None, None, None], 0, 255).astype(np.uint8)
    assert metrics.warp_error(flickering, source) == pytest.approx(10, abs=2)


def test_legacy_warp_error_reads_128_where_the_true_error_is_one_level():
    frames = flat(100, 100, size=16)
    frames[1, :8] += 1
    frames[1, 8:] -= 1
    still = np.zeros((16, 16, 2), dtype=np.float32)
    assert metrics.warp_error(frames, frames, [(still, still)]) == pytest.approx(1)
    assert metrics.legacy_warp_error(frames, frames, [(still, still)]) == pytest.approx(128)  # half 1, half 255
    # Only brighter: warped − now = −1 wraps to 255; only darker: +1 stays 1.
    assert metrics.legacy_warp_error(flat(100, 101), flat(0, 0), [(still, still)]) == 255
    assert metrics.legacy_warp_error(flat(101, 100), flat(0, 0), [(still, still)]) == 1


def test_occluded_pixels_are_left_out():
    """A square moves right over a still background: what it uncovers has no predecessor."""
    source = flat(50, 50, size=24)
    source[0, 8:16, 4:12] = 200
    source[1, 8:16, 10:18] = 200
    forward, backward = (np.zeros((24, 24, 2), dtype=np.float32) for _ in range(2))
    forward[8:16, 4:12, 0] = 6
    backward[8:16, 10:18, 0] = -6
    valid = metrics.flow_is_consistent(backward, forward)
    uncovered = np.zeros((24, 24), dtype=bool)
    uncovered[8:16, 4:10] = True
    assert np.array_equal(~valid, uncovered)
    assert metrics.warp_error(source, source, [(forward, backward)]) == pytest.approx(0, abs=1e-4)
    covered = np.zeros((24, 24), dtype=bool)
    covered[8:16, 12:18] = True
    assert np.array_equal(~metrics.flow_is_consistent(forward, backward), covered)


def test_flow_that_leaves_the_picture_is_not_valid():
    right = STILL + np.float32([5, 0])
    valid = metrics.flow_is_consistent(right, -right)
    assert valid[:, :19].all() and not valid[:, 19:].any()


def test_sharpness_by_hand():
    assert metrics.sharpness(flat(7, 9)) == 0
    checker = np.indices((16, 16)).sum(axis=0) % 2 * 10
    frames = np.repeat(checker[None, ..., None], 3, axis=-1).astype(np.uint8)
    assert metrics.sharpness(frames) == pytest.approx(1600, rel=1e-4)  # Laplacian is ±40, mean 0
    blurred = (texture(32, 32)[None, :-1, :-1].astype(np.float32) + texture(32, 32)[None, 1:, 1:]) / 510
    assert metrics.sharpness(blurred) < metrics.sharpness(texture(32, 32)[None])


def test_temporal_consistency():
    frame = texture(32, 32)
    assert metrics.temporal_consistency(np.stack([frame, frame])) == pytest.approx(100, abs=1e-4)
    assert metrics.temporal_consistency(np.stack([frame, 255 - frame])) == pytest.approx(-100, abs=1e-3)
    embed = {"embed": lambda video: np.array([[1.0, 0], [0, 2.0], [0, 1.0]])}
    assert metrics.temporal_consistency(flat(1, 2, 3), **embed) == pytest.approx(50)  # cosines 0 and 1
    assert math.isnan(metrics.temporal_consistency(flat(1)))


def test_lab_of_known_colours():
    colours = np.float32([[[255, 255, 255], [255, 0, 0], [0, 0, 0]]])
    wanted = np.float32([[[100, 0, 0], [53.24, 80.09, 67.20], [0, 0, 0]]])
    np.testing.assert_allclose(metrics._lab(colours), wanted, atol=0.1)


def test_colour_drift_by_hand():
    picture = texture(24, 24)
    dull = (picture.astype(np.float32) * 0.5).astype(np.uint8)
    video = np.stack([picture] * 4 + [dull] * 4 + [picture] * 3)  # 2 fps, windows of 2 s = 4 frames; 3 left out
    drift = metrics.colour_drift(video, fps=2, reference_seconds=2)
    np.testing.assert_allclose(drift.time_s, [0, 2])
    assert drift.delta_e[0] == 0 and drift.delta_e[1] > 10
    assert drift.contrast_ratio[0] == 1 and drift.contrast_ratio[1] < 0.8
    assert drift.sharpness_ratio[1] == pytest.approx(0.25, rel=0.1)  # variance goes with the square
    own = metrics.colour_drift(video, fps=2, reference_seconds=2, source=video)
    np.testing.assert_allclose(own.delta_e, 0)
    np.testing.assert_allclose(own.contrast_ratio, 1)
    grey = metrics.colour_drift(flat(255, 0), fps=1)
    assert grey.delta_e[1] == pytest.approx(100, abs=0.1)
    with pytest.raises(ValueError, match="less than the reference of 2.0 s = 60 frames"):
        metrics.colour_drift(video, fps=30, reference_seconds=2.0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\) and \(1, 16, 16, 3\)"):
        metrics.flicker(flat(1, 2), flat(1))
    with pytest.raises(ValueError, match="1 flow pairs .* 3 frames need 2"):
        metrics.warp_error(flat(1, 2, 3), flat(1, 2, 3), [(STILL, STILL)])
    with pytest.raises(ValueError, match="int64"):
        metrics.psnr(np.array([1]), np.array([1]))
