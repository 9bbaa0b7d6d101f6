"""Pictures from outside: the size is known and refused before anything is decoded, wherever the file hides it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from streamdiff_core.live_codec import BadMessageError, decode_frame
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_reader import MAX_JPEG_PIXELS, read_jpeg


def jpeg(width: int, height: int) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 200, np.uint8))[1].tobytes()


SMALL, BOMB = jpeg(64, 64), jpeg(4096, 2049)
BEHIND_A_SMALL_ONE = SMALL[:-2] + BOMB[2:]
"""One file, two headers: whoever looks at the first only sees 64×64, FFmpeg decodes the second."""


def test_a_bomb_is_small_and_would_be_large() -> None:
    assert len(BOMB) < 150_000 and 4096 * 2049 > MAX_JPEG_PIXELS


@pytest.mark.parametrize("data", [BOMB, BEHIND_A_SMALL_ONE], ids=["plain", "behind a small header"])
def test_too_many_pixels_are_refused_by_the_decoder_itself(data: bytes) -> None:
    with pytest.raises(VideoReadError, match="at most 8,388,608 pixels"):
        read_jpeg(data)


def test_the_largest_picture_that_is_taken() -> None:
    assert read_jpeg(jpeg(4096, 2048)).shape == (2048, 4096, 3)


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (BOMB, "too_large", "A frame of 4096×2049 pixels came; at most 8,388,608 pixels are accepted."),
        (BEHIND_A_SMALL_ONE, "bad_frame", "A frame is damaged."),
    ],
)
def test_the_viewer_is_told_in_one_sentence(data: bytes, code: str, words: str) -> None:
    with pytest.raises(BadMessageError) as told:
        decode_frame(data, "jpeg", (256, 256))
    assert (told.value.code, str(told.value)) == (code, words) and told.value.action


def test_a_webp_has_the_same_limit() -> None:
    data = cv2.imencode(".webp", np.zeros((2049, 4096, 3), np.uint8))[1].tobytes()
    with pytest.raises(BadMessageError, match="4096×2049 pixels came; at most"):
        decode_frame(data, "webp", (256, 256))
