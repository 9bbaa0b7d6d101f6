"""What the drift meter calls drift, by how much, and what it does not: the camera's own doing, one odd chunk."""

from __future__ import annotations

import numpy as np
import pytest

import streamdiff_core
from streamdiff_core.drift import THRESHOLDS, Drift, DriftMeter
from streamdiff_core.metrics import colour_drift

FPS, CHUNK = 8.0, 4


def picture(seed: int = 0, mean: float = 120, spread: float = 25, side: int = 64, block: int = 4) -> np.ndarray:
    """uint8 [side, side, 3]: blocks of pixels in random colours."""
    blocks = np.random.default_rng(seed).normal(mean, spread, (side // block, side // block, 3))
    return np.kron(blocks, np.ones((block, block, 1))).clip(0, 255).astype(np.uint8)


def chunk(frame: np.ndarray) -> np.ndarray:
    return np.repeat(frame[None], CHUNK, axis=0)


def follow(meter: DriftMeter, before: np.ndarray, after: np.ndarray, num_chunks: int = 4) -> Drift:
    """Four chunks are the reference's two seconds."""
    for _ in range(num_chunks):
        drift = meter.update(chunk(before), chunk(after))
    assert meter.drift == drift
    return drift


def lightness(grey: int) -> float:
    """CIE L* of an sRGB grey level, from the definition."""
    linear = ((grey / 255 + 0.055) / 1.055) ** 2.4
    return 116 * linear ** (1 / 3) - 16


def grey(level: int) -> np.ndarray:
    return np.full((64, 64, 3), level, np.uint8)


def test_nothing_changes_nothing_drifts() -> None:
    meter = DriftMeter(fps=FPS)
    assert follow(meter, picture(1), picture(2), 20) == Drift() == Drift(colour=0.0, contrast=1.0, sharpness=1.0)
    assert meter.drift.level == "ok"


def test_colour_is_the_distance_in_lab() -> None:
    meter = DriftMeter(fps=FPS)
    follow(meter, picture(), grey(100))
    assert follow(meter, picture(), grey(130)).colour == pytest.approx(
        lightness(130) - lightness(100), abs=0.2
    )  # OpenCV works with tables


@pytest.mark.parametrize("side", [64, 96, 256])
def test_agrees_with_the_offline_measure(side: int) -> None:
    """`metrics.colour_drift` looks at every pixel of every frame; here every fourth row at most, one frame a chunk."""
    source, first = picture(1, side=side), picture(2, side=side)
    later = (90 + 1.3 * (first.astype(float) - 120) + np.array([20, 0, -10])).clip(0, 255).astype(np.uint8)
    meter = DriftMeter(fps=FPS)
    follow(meter, source, first)
    drift = follow(meter, source, later)
    clip = np.concatenate([np.repeat(first[None], 16, 0), np.repeat(later[None], 16, 0)])
    expected = colour_drift(clip, FPS, reference_seconds=2.0)
    assert drift.colour == pytest.approx(expected.delta_e[1], rel=0.02)
    assert drift.contrast == pytest.approx(expected.contrast_ratio[1], rel=0.02)
    assert drift.sharpness == pytest.approx(expected.sharpness_ratio[1], rel=0.05)


def test_contrast_and_sharpness_go_both_ways() -> None:
    first = picture(2)
    flat = (120 + 0.5 * (first.astype(float) - 120)).astype(np.uint8)
    for a, b, is_more in ((first, flat, False), (flat, first, True)):
        meter = DriftMeter(fps=FPS)
        follow(meter, picture(), a)
        drift = follow(meter, picture(), b)
        assert (drift.contrast > 1.8, drift.contrast < 0.56) == (is_more, not is_more)
        assert (drift.sharpness > 3.6, drift.sharpness < 0.28) == (is_more, not is_more)
        assert drift.level == "much"


def test_blur_is_seen_by_sharpness_first() -> None:
    import cv2

    first = picture(2, side=256, block=32)
    meter = DriftMeter(fps=FPS)
    follow(meter, picture(side=256), first)
    drift = follow(meter, picture(side=256), cv2.GaussianBlur(first, (0, 0), 1))
    assert drift.colour < 1 and drift.contrast > 0.8 and 0.3 < drift.sharpness < 0.5 and drift.level == "much"


@pytest.mark.parametrize("style", ["copy", "negative", "grey"])
def test_what_the_camera_does_is_not_drift(style: str) -> None:
    """A pan to another scene: whatever way the style follows it, or not at all."""
    apply = {
        "copy": lambda f: f,
        "negative": lambda f: (40 + 0.6 * (255 - f.astype(float))).astype(np.uint8),
        "grey": lambda f: np.repeat(f.mean(-1, keepdims=True), 3, -1).astype(np.uint8),
    }[style]
    here, there = picture(1, 150, 20), (picture(5, 90, 40) * np.array([1.0, 0.8, 0.6])).astype(np.uint8)
    meter = DriftMeter(fps=FPS)
    follow(meter, here, apply(here))
    assert follow(meter, there, apply(there)).level == "ok"
    still = DriftMeter(fps=FPS)
    follow(still, here, apply(here))
    assert follow(still, here, apply(there)).level == "much"  # the same change, the camera stands still


def test_the_reference_is_the_first_seconds() -> None:
    """Until two seconds have passed there is none; then it stays."""
    meter = DriftMeter(fps=FPS, reference_s=2.0)
    assert follow(meter, picture(), grey(100), 3) == Drift()
    meter.update(chunk(picture()), chunk(grey(100)))
    follow(meter, picture(), grey(160), 50)
    assert follow(meter, picture(), grey(100)).colour == pytest.approx(0, abs=1e-9)


def test_now_is_the_mean_of_the_latest_seconds() -> None:
    """One chunk of four counts a quarter and is forgotten after four more; only that many are kept."""
    meter, full = DriftMeter(fps=FPS), lightness(180) - lightness(100)
    follow(meter, picture(), grey(100), 10)
    drifts = [meter.update(chunk(picture()), chunk(grey(180))).colour]
    drifts += [meter.update(chunk(picture()), chunk(grey(100))).colour for _ in range(4)]
    assert drifts == pytest.approx([full / 4] * 4 + [0], abs=0.02)
    assert len(meter._recent) == 4


def test_chunks_count_by_their_frames() -> None:
    meter = DriftMeter(fps=8, reference_s=1.0)
    meter.update(grey(100)[None].repeat(5, 0), grey(100)[None].repeat(5, 0))
    meter.update(grey(100)[None].repeat(3, 0), grey(100)[None].repeat(3, 0))
    meter.update(grey(100)[None].repeat(2, 0), grey(180)[None].repeat(2, 0))  # with the 3 + 5 before it: 10 frames
    assert meter.drift.colour == pytest.approx((lightness(180) - lightness(100)) * 2 / 10, abs=0.02)


def test_anchor_begins_again() -> None:
    meter = DriftMeter(fps=FPS)
    follow(meter, picture(), grey(100))
    assert follow(meter, picture(), grey(200)).level == "much"
    meter.anchor()
    assert meter.drift == Drift()
    assert follow(meter, picture(), grey(200), 10) == Drift()


def test_flat_pictures_are_no_division_by_zero() -> None:
    meter = DriftMeter(fps=FPS)
    follow(meter, grey(0), grey(255))
    assert follow(meter, grey(0), grey(255)) == Drift()
    assert follow(meter, grey(0), picture()).contrast > 10


@pytest.mark.parametrize("name", THRESHOLDS)
def test_levels(name: str) -> None:
    some, much = THRESHOLDS[name]
    assert [Drift(**{name: value}).level for value in (some - 0.01, some, much - 0.01, much)] == [
        "ok", "some", "some", "much",
    ]  # fmt: skip
    if name != "colour":
        assert Drift(**{name: 1 / much}).level == "much"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (chunk(grey(0)), chunk(grey(0))[:2], "same number of frames"),
        (chunk(grey(0))[:0], chunk(grey(0))[:0], "same number of frames"),
        (chunk(grey(0)), chunk(grey(0)) / 255, "uint8"),
        (grey(0), chunk(grey(0)), "T, H, W, 3"),
    ],
)
def test_refused(before: np.ndarray, after: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DriftMeter().update(before, after)


def test_public_name_and_settings() -> None:
    assert streamdiff_core.DriftMeter is DriftMeter and streamdiff_core.Drift is Drift
    for wrong in ({"fps": 0}, {"reference_s": -1.0}, {"fps": float("nan")}):
        with pytest.raises(ValueError, match="above 0"):
            DriftMeter(**wrong)
