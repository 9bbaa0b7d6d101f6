"""The bar code itself: what the browser tests prove rests on it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.browser import marker


def degraded(frame: np.ndarray) -> np.ndarray:
    """Centre square, 256 pixels, JPEG at quality 70."""
    side = min(frame.shape[:2])
    top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
    square = cv2.resize(frame[top : top + side, left : left + side], (256, 256), interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, 70])[1], cv2.IMREAD_COLOR)


@pytest.mark.parametrize("mirrored", [False, True])
def test_code_survives_the_way_to_the_canvas(mirrored):
    rng = np.random.default_rng(0)
    for owner, number in [
        (0, 0),
        (1, 1),
        (5, 1023),
        (7, 512),
        *((int(i % 8), int(rng.integers(1024))) for i in range(50)),
    ]:
        frame = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        square = degraded(marker.stamp(frame, owner, number))
        assert marker.read(square[:, ::-1] if mirrored else square) == (owner, number)


def test_picture_without_code_is_not_read_as_one():
    assert marker.read(np.full((256, 256, 3), 90, np.uint8)) is None
    square = degraded(marker.stamp(np.full((480, 640, 3), 90, np.uint8), 3, 77))
    square[-16:, 8:40] = 255 - square[-16:, 8:40]
    square[-32:-16, 8:40] = 255 - square[-32:-16, 8:40]  # one cell of the lower row turned: parity notices
    assert marker.read(square) is None
