"""What the tests ask of an open page: its own measurements, and every frame that reached the output canvas."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tests.browser import marker

WATCH = (
    """
() => {
  const canvas = document.querySelector('#sd-output');
  window.seen = [];
  let last = null;
  const look = () => {
    const frame = window.streamdiff.lastFrame;
    if (frame && frame !== last) {
      last = frame;
      const { width, height } = canvas;
      const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
      const mean = (i) => (data[i] + data[i + 1] + data[i + 2]) / 3;
      const grey = (x, y) => mean(4 * (Math.round(y) * width + Math.round(x)));
      const cells = [];
      for (let r = 0; r < ROWS; r++) for (let c = 0; c < COLUMNS; c++) {
        const x = (c + 0.5) * width / COLUMNS, y = height * (1 - BAND) + (r + 0.5) * BAND * height / ROWS;
        let sum = 0;
        for (const dx of [-4, 0, 4]) for (const dy of [-4, 0, 4]) sum += grey(x + dx, y + dy);
        cells.push(sum / 9);
      }
      let colour = 0, light = 0, count = 0;
      for (let i = 0; i < 4 * width * height * (1 - BAND); i += 4 * 97) {
        colour += Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]);
        light += mean(i);
        count += 1;
      }
      const { seq, chunk, drawn_ms, captured_ms } = frame;
      window.seen.push([seq, chunk, drawn_ms, captured_ms, colour / count, light / count, ...cells]);
    }
    requestAnimationFrame(look);
  };
  look();
}
""".replace("ROWS", "2")
    .replace("COLUMNS", str(marker.COLUMNS))
    .replace("BAND", str(marker.BAND))
)


@dataclass(frozen=True)
class Seen:
    """One frame as it stood on the output canvas."""

    seq: int
    chunk: int
    drawn_ms: float
    captured_ms: float | None
    colourfulness: float
    lightness: float
    code: tuple[int, int] | None
    """(owner, number) of its bar code, None when it cannot be read."""


def metrics(page: Any) -> dict[str, Any]:
    """The page's own figures."""
    return page.evaluate("() => window.streamdiff.metrics()")


def wait_for_frames(page: Any, count: int = 1, timeout_s: float = 60) -> None:
    """Wait until ``count`` restyled frames were drawn."""
    page.wait_for_function(f"() => window.streamdiff.metrics().drawn >= {count}", timeout=timeout_s * 1000)


def use_camera(page: Any) -> None:
    """Press the webcam button, unmirrored, and wait for its frames."""
    page.get_by_test_id("source-camera").click()
    page.wait_for_function("() => window.streamdiff.metrics().source === 'camera'", timeout=20_000)
    page.get_by_test_id("camera-mirror").uncheck()
    before = metrics(page)["drawn"]
    wait_for_frames(page, before + 12)


def watch(page: Any) -> None:
    """Begin to note every frame drawn; a second call starts anew."""
    page.evaluate("() => { window.seen = []; }") if page.evaluate("() => 'seen' in window") else page.evaluate(WATCH)


def seen(page: Any) -> list[Seen]:
    """Frames drawn since ``watch``."""
    rows = page.evaluate("() => window.seen")
    return [Seen(*row[:6], code=marker.decode(np.array(row[6:]).reshape(2, -1))) for row in rows]


def picture(page: Any, canvas: str) -> np.ndarray:
    """A canvas (``sd-output``, ``sd-input``) as uint8 [H, W, 3]."""
    url = page.evaluate(f"() => document.querySelector('#{canvas}').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def stream_for(page: Any, seconds: float) -> dict[str, Any]:
    """Let it run; frames drawn a second and lags, by the page's own clock."""
    before, start_s = metrics(page), time.perf_counter()
    page.wait_for_timeout(seconds * 1000)
    after, took_s = metrics(page), time.perf_counter() - start_s
    return {**after, "drawn_per_s": (after["drawn"] - before["drawn"]) / took_s}
