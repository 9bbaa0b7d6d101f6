"""Frames at the border: uint8 pictures in, float tensors inside, and the one resize that both share.

Everything outside the library is uint8 ``[T, H, W, 3]`` RGB; everything inside is float32 ``[B, F, C, H, W]``
in [-1, 1]. Nothing here reads files (``video_io``) or keeps state, so any split of a clip gives the same
pixels.
Shape letters: T frames, H x W picture size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.types import GREY_LEVELS_PER_UNIT

MIN_SIDE_PX = 64
"""Shortest side, in pixels, that ``fit_size`` gives."""


def check_frames(frames: np.ndarray, size: tuple[int, int] | None = None) -> None:
    """Refuse anything but uint8 ``[T, H, W, 3]`` (T may be 0), of this (width, height) where one is given.

    Raises:
        ValueError: Wrong type, rank, number of channels or size; the text says what arrived.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise ValueError(f"frames must be a numpy array of uint8, got {kind}; scale to 0…255 and use .astype('uint8')")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"frames must have shape [T, H, W, 3], got {list(frames.shape)}; one frame is frames[None]")
    if size is not None and (frames.shape[2], frames.shape[1]) != size:
        got, wanted = f"{frames.shape[2]}×{frames.shape[1]}", f"{size[0]}×{size[1]}"
        raise ValueError(f"frames of {got} pixels came, the stream's are {wanted}; use resize_and_crop, or push")


def resize_and_crop(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Centre-crop to the target's aspect ratio, then resize once: area average to shrink, bicubic to grow.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        width: Target width in pixels.
        height: Target height in pixels.

    Returns:
        uint8 ``[T, height, width, 3]``; the input itself when it already has that size.

    Raises:
        ValueError: Not uint8 ``[T, H, W, 3]``, or a target below one pixel.
    """
    check_frames(frames)
    if width < 1 or height < 1:
        raise ValueError(f"target size must be at least 1×1 pixels, got {width}×{height}")
    source_height, source_width = frames.shape[1:3]
    if (source_width, source_height) == (width, height):
        return frames
    import cv2

    scale = max(width / source_width, height / source_height)
    crop_width = min(source_width, max(1, round(width / scale)))
    crop_height = min(source_height, max(1, round(height / scale)))
    left, top = (source_width - crop_width) // 2, (source_height - crop_height) // 2
    cropped = frames[:, top : top + crop_height, left : left + crop_width]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    out = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for source, target in zip(cropped, out, strict=True):
        target[:] = cv2.resize(source, (width, height), interpolation=method)
    return out


def frames_to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 ``[T, H, W, 3]`` → float32 ``[1, T, 3, H, W]`` in [-1, 1] (0 → -1, 255 → 1).

    Raises:
        ValueError: Not uint8 ``[T, H, W, 3]``.
    """
    check_frames(frames)
    pixels = torch.tensor(np.ascontiguousarray(frames))  # mirrored or read-only arrays are no torch views
    return pixels.permute(0, 3, 1, 2)[None].to(torch.float32).div_(GREY_LEVELS_PER_UNIT).sub_(1.0)


def tensor_to_frames(x: Tensor) -> np.ndarray:
    """``tensor_to_uint8`` on the host."""
    return tensor_to_uint8(x).cpu().numpy()


def tensor_to_uint8(x: Tensor) -> Tensor:
    """Float ``[1, T, 3, H, W]`` in [-1, 1] → uint8 ``[T, H, W, 3]``, rounded to nearest, clamped to 0…255.

    Raises:
        ValueError: Not ``[1, T, 3, H, W]``.
    """
    if x.ndim != 5 or x.shape[0] != 1 or x.shape[2] != 3:
        raise ValueError(f"expected [1, T, 3, H, W], got {list(x.shape)}; pass one stream at a time")
    pixels = (x[0].detach().to(torch.float32) + 1.0).mul_(GREY_LEVELS_PER_UNIT).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def fit_size(width: int, height: int, area_px: int, multiple: int = 16) -> tuple[int, int]:
    """Size with the aspect ratio of ``width``×``height`` and about ``area_px`` pixels.

    Returns:
        ``(width, height)``, each a multiple of ``multiple`` and at least 64.

    Raises:
        ValueError: An argument below 1.
    """
    if min(width, height, area_px, multiple) < 1:
        raise ValueError(f"sizes must be at least 1, got {width}×{height}, area {area_px}, multiple {multiple}")
    scale = math.sqrt(area_px / (width * height))
    shortest = math.ceil(MIN_SIDE_PX / multiple)
    fitted = [max(shortest, round(side * scale / multiple)) * multiple for side in (width, height)]
    return fitted[0], fitted[1]
