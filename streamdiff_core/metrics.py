"""Quality of an output video: warp error, flicker, drift, sharpness; plain definitions, no learned judge.

Frames are uint8 [T, H, W, 3] RGB (NumPy or CPU tensor), or float in [0, 1]; differences are in grey levels of
255. `frames` is the output and `source` the input it was made from, frame by frame. The upstream evaluation's
warp error wraps around modulo 256; `legacy_warp_error` reproduces that figure so that published numbers can
be compared, and `warp_error` is the correct one. Latency, jitter and deadline misses are in `timing.py`.
Source: paper tables 1 and 2; SPEC §9.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch

FlowPair: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Optical flow between frames i and i+1, float32 [H, W, 2] (x, y) in pixels: forward (on frame i, points into
frame i+1) and backward (on frame i+1, points into frame i)."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all values; infinite for equal arrays. Higher is closer.

    Args:
        a: uint8, or float in [0, 1]; any shape.
        b: the same shape; the two may differ in dtype.

    Raises:
        ValueError: different shapes.

    Source: 10·log10(255² / MSE).
    """
    a, b = _levels(a), _levels(b)
    if a.shape != b.shape:
        raise ValueError(f"psnr needs equal shapes, got {a.shape} and {b.shape}")
    mse = np.mean((a - b) ** 2, dtype=np.float64)
    return float(10 * np.log10(255**2 / mse)) if mse > 0 else float("inf")


def flicker(frames: np.ndarray, source: np.ndarray, still_threshold: float = 2.0) -> float:
    """Frame-to-frame change of the output where the input is still, in grey levels [0, 255]; lower is better.

    Args:
        frames: output [T, H, W, 3].
        source: input [T, H, W, 3].
        still_threshold: a pixel is still when no channel of the input changes by more than this many levels.

    Returns:
        Mean absolute change over all still pixels of all frame pairs; NaN if no pixel is ever still.

    Source: ours; isolates what the model adds to the motion of its input.
    """
    _check_videos(frames, source)
    total, count = 0.0, 0
    for (out_a, out_b), (src_a, src_b) in zip(_pairs(frames), _pairs(source), strict=True):
        still = np.abs(src_b - src_a).max(axis=-1) <= still_threshold  # [H, W]
        total += float(np.abs(out_b - out_a).mean(axis=-1)[still].sum(dtype=np.float64))
        count += int(still.sum())
    return total / count if count else float("nan")


def estimate_flow(source: np.ndarray) -> list[FlowPair]:
    """Optical flow of all frame pairs of a video [T, H, W, 3] by OpenCV's DIS estimator (medium preset).

    The published figures use RAFT-large; DIS needs no weights and runs on a CPU. Another estimator's flow can
    be handed to the warp errors instead. DIS cannot see frames under 12 pixels.
    """
    return list(zip(estimate_forward_flow(source), estimate_forward_flow(source[::-1])[::-1], strict=True))


def estimate_forward_flow(source: np.ndarray) -> list[np.ndarray]:
    """The first half of ``estimate_flow``, at half the price: each frame's flow [H, W, 2] to the next one."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [np.rint(_levels(frame) @ LUMA).astype(np.uint8) for frame in source]
    return [dis.calc(a, b, None) for a, b in pairwise(grey)]


def warp_error(frames: np.ndarray, source: np.ndarray, flow: Sequence[FlowPair] | None = None) -> float:
    """Mean absolute error, in grey levels [0, 255], of each frame against the last moved along the flow.

    The flow is measured on the source, so an output that moves exactly as its input does scores about 0.
    Pixels that were hidden in the frame before are left out: forward and backward flow must cancel
    (`flow_is_consistent`). Mean over frame pairs of the mean over valid pixels; NaN for fewer than two frames
    or when nothing is valid.

    Source: SPEC §9.3, corrected: float arithmetic and the occlusion mask of the frame compared.
    """
    _check_videos(frames, source)
    errors = []
    for (before, now), (forward, backward) in zip(_pairs(frames), _flow_of(source, flow), strict=True):
        valid = flow_is_consistent(backward, forward)
        if valid.any():
            errors.append(np.abs(now - _warp(before, backward)).mean(axis=-1)[valid].mean(dtype=np.float64))
    return float(np.mean(errors)) if errors else float("nan")


def legacy_warp_error(frames: np.ndarray, source: np.ndarray, flow: Sequence[FlowPair] | None = None) -> float:
    """The figure of the upstream evaluation, [0, 255]: only for comparison with its tables.

    Three defects are kept on purpose: differences of uint8 wrap around modulo 256 before the absolute value
    (an error of −1 reads 255, so unbiased ±1 noise reads 128); pixels are masked by the occlusion of the
    earlier frame although the later frame is compared; pixels from outside the picture count as black.
    Upstream's flow is RAFT-large.

    Source: SPEC §9.3 (published: 73 to 117).
    """
    import cv2

    _check_videos(frames, source)
    levels = [np.rint(_levels(frame)).astype(np.uint8) for frame in frames]
    errors = []
    for (before, now), (forward, backward) in zip(pairwise(levels), _flow_of(source, flow), strict=True):
        places = np.ascontiguousarray(_grid(backward) + backward, dtype=np.float32)
        warped = cv2.remap(before, places, None, cv2.INTER_LINEAR)
        visible = flow_is_consistent(forward, backward, inside=False)
        if visible.any():
            errors.append(np.abs(warped - now)[visible].mean(dtype=np.float64))  # uint8 − uint8: wraps
    return float(np.mean(errors)) if errors else float("nan")


def flow_is_consistent(
    flow: np.ndarray, reverse: np.ndarray, alpha: float = 0.01, beta: float = 0.5, inside: bool = True
) -> np.ndarray:
    """Where following `flow` and then `reverse` comes back to the start: bool [H, W] on the grid of `flow`.

    Args:
        flow: [H, W, 2] in pixels.
        reverse: flow of the other direction, on the other frame's grid.
        alpha: tolerance as a share of the flow's length.
        beta: tolerance in pixels.
        inside: also require the flow to end inside the picture.

    Source: forward-backward check of UnFlow (arXiv 1711.07837) with the upstream evaluation's alpha and beta.
    """
    gap = np.linalg.norm(flow + _warp(reverse, flow), axis=-1)
    length = np.linalg.norm(flow, axis=-1) + np.linalg.norm(reverse, axis=-1)
    consistent = gap <= alpha * length + beta
    if not inside:
        return consistent
    ends, (height, width) = _grid(flow) + flow, flow.shape[:2]
    return consistent & ((ends >= 0) & (ends <= (width - 1, height - 1))).all(axis=-1)


def temporal_consistency(
    frames: np.ndarray, embed: Callable[[np.ndarray], np.ndarray] | None = None, grid: int = 16
) -> float:
    """Mean cosine of consecutive frames' features × 100, in [-100, 100]; higher is steadier.

    Args:
        frames: output [T, H, W, 3].
        embed: frames → features [T, D]; with CLIP image features this is the published "CLIP score". Without
            it the feature is a grid × grid thumbnail with its mean removed; the two are not comparable.
        grid: side of that thumbnail.

    Returns:
        NaN for fewer than two frames.

    Source: SPEC §9.3 (consecutive frames, as upstream's code has it; its paper says against a reference).
    """
    features = np.asarray((embed or (lambda video: _thumbnails(video, grid)))(frames), dtype=np.float64)
    if len(features) < 2:
        return float("nan")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return float(100 * (unit[1:] * unit[:-1]).sum(axis=1).mean())


def sharpness(frames: np.ndarray) -> float:
    """Variance of the Laplacian of luma, in squared grey levels, mean over frames [T, H, W, 3]; flat is 0.

    Source: the usual focus measure (4-neighbour Laplacian, borders left out). Noise raises it too.
    """
    return float(np.mean([_laplacian_variance(_levels(frame) @ LUMA) for frame in frames]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourDrift:
    """Drift of a video against its first seconds, one value per window; the first shows none."""

    time_s: np.ndarray
    """Start of each window, in s."""
    delta_e: np.ndarray
    """Distance of the mean Lab colour from the first window's (CIE76); about 2 is just visible."""
    contrast_ratio: np.ndarray
    """Standard deviation of lightness over the first window's; 1 = no drift."""
    sharpness_ratio: np.ndarray
    """Variance of the Laplacian over the first window's; 1 = no drift."""


def colour_drift(
    frames: np.ndarray, fps: float, reference_seconds: float = 1.0, source: np.ndarray | None = None
) -> ColourDrift:
    """Mean Lab colour, contrast and sharpness per window of `reference_seconds`, against the first window.

    Args:
        frames: output [T, H, W, 3]; an incomplete window at the end is left out.
        fps: frames per second.
        reference_seconds: length of the reference and of every window, in s.
        source: input [T, H, W, 3]; its own change (a cut, a cloud) is taken off: colour by difference,
            ratios by quotient.

    Raises:
        ValueError: the video is shorter than one window.

    Source: ours; quantities as plain as possible, no claim of perceptual quality.
    """
    window = max(round(fps * reference_seconds), 1)
    if len(frames) < window:
        raise ValueError(f"{len(frames)} frames are less than the reference of {reference_seconds} s = {window} frames")
    lab, contrast, sharp = _drift(frames, window)
    if source is not None:
        _check_videos(frames, source)
        source_lab, source_contrast, source_sharp = _drift(source, window)
        lab, contrast, sharp = lab - source_lab, contrast / source_contrast, sharp / source_sharp
    return ColourDrift(
        time_s=np.arange(len(lab)) * window / fps,
        delta_e=np.linalg.norm(lab, axis=1),
        contrast_ratio=contrast,
        sharpness_ratio=sharp,
    )


def _drift(frames: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per window: mean Lab minus the first window's [N, 3], contrast ratio [N], sharpness ratio [N]."""
    rows = []
    for frame in frames[: len(frames) // window * window]:
        levels = _levels(frame)
        lab = _lab(levels)
        rows.append([*lab.mean(axis=(0, 1)), lab[..., 0].std(), _laplacian_variance(levels @ LUMA)])
    means = np.array(rows, dtype=np.float64).reshape(-1, window, 5).mean(axis=1)  # [N, 5]
    ratios = np.maximum(means[:, 3:], 1e-6) / np.maximum(means[0, 3:], 1e-6)
    return means[:, :3] - means[0, :3], ratios[:, 0], ratios[:, 1]


def _lab(levels: np.ndarray) -> np.ndarray:
    """sRGB grey levels [H, W, 3] → CIE Lab (D65), L in [0, 100]."""
    import cv2

    return cv2.cvtColor(levels / np.float32(255), cv2.COLOR_RGB2Lab)


def _laplacian_variance(luma: np.ndarray) -> float:
    c = luma[1:-1, 1:-1]
    return float((luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * c).var(dtype=np.float64))


def _thumbnails(frames: np.ndarray, grid: int) -> np.ndarray:
    luma = torch.from_numpy(np.stack([_levels(frame) @ LUMA for frame in frames]))[:, None]  # [T, 1, H, W]
    small = torch.nn.functional.adaptive_avg_pool2d(luma, grid).flatten(1).numpy()  # [T, grid²]
    return small - small.mean(axis=1, keepdims=True)


def _levels(frame: np.ndarray) -> np.ndarray:
    """Grey levels in float32: uint8 as they are, floats in [0, 1] times 255."""
    frame = np.asarray(frame)
    if frame.dtype == np.uint8:
        return frame.astype(np.float32)
    if not np.issubdtype(frame.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or float in [0, 1], got {frame.dtype}")
    return frame.astype(np.float32) * 255


def _pairs(frames: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive frames as grey levels, without holding the whole video in float."""
    before = None
    for frame in frames:
        now = _levels(frame)
        if before is not None:
            yield before, now
        before = now


def _flow_of(source: np.ndarray, flow: Sequence[FlowPair] | None) -> Sequence[FlowPair]:
    flow = estimate_flow(source) if flow is None else flow
    if len(flow) != len(source) - 1:
        raise ValueError(f"{len(flow)} flow pairs do not fit: {len(source)} frames need {len(source) - 1}")
    return flow


def _grid(flow: np.ndarray) -> np.ndarray:
    """Pixel positions (x, y) [H, W, 2]."""
    height, width = flow.shape[:2]
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def _warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """``image(x + flow(x))`` with exact bilinear weights, 0 outside; image [H, W, N], flow [H, W, 2]."""
    height, width = flow.shape[:2]
    places = (_grid(flow) + flow) * (2 / max(width - 1, 1), 2 / max(height - 1, 1)) - 1
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))[None],
        torch.from_numpy(places.astype(np.float32))[None],
        align_corners=True,
    )
    return sampled[0].permute(1, 2, 0).numpy()


def _check_videos(frames: np.ndarray, source: np.ndarray) -> None:
    shapes = tuple(np.shape(frames)), tuple(np.shape(source))
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise ValueError(f"output and source must be equal [T, H, W, 3], got {shapes[0]} and {shapes[1]}")
