"""The live stream where no socket may use the GPU: Hugging Face ZeroGPU, which lends one per Gradio event.

The camera's frames go through ``gr.Image`` streaming into a slot of memory shared with the worker; one long generator
event holds the GPU, reads the newest frame (of the sample clip while no camera is on), and yields pictures, which go
to the page inside its events and never through a file. Slots are made at import, before any worker is forked: a worker
sees only memory that existed then. About half the rate of the socket; there is no recording here.
"""

from __future__ import annotations

import base64
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from demo.session import encode_jpeg
from demo.ui import FIRST_STYLE, STATIC, STYLES, SYSTEM_FONTS
from demo.zerogpu_slots import Slot, SlotPool
from streamdiff_core import StreamPipeline
from streamdiff_core.frames import resize_and_crop
from streamdiff_core.video_io import read_video

logger = logging.getLogger(__name__)

NUM_SLOTS = 8
SECONDS = 30
"""GPU time asked for at a press of Start; the daily quota is minutes."""
CAMERA_GONE_S = 1.0
"""Without a camera frame for so long the sample clip plays."""
STYLE = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
#sd-zero-row { flex-wrap: wrap; }
#sd-zero-picture, #sd-zero-picture .html-container { padding: 0 !important; }
#sd-zero-picture img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 10px; }
#sd-zero-status { min-height: 24px; }
"""


def stream_slot(pipe: StreamPipeline, slot: Slot, prompt: str, noise_scale: float, seconds: float) -> Iterator[Any]:
    """One stream over a slot: pictures uint8 [side, side, 3] until the time is up; repeated frames are not computed."""
    slot.ask(prompt, noise_scale)
    newest = newest_frames(slot, pipe.preset.fps)
    end_s, asked = time.monotonic() + seconds, (prompt, noise_scale)
    with pipe.start(prompt, noise_scale=noise_scale, width=slot.side, height=slot.side) as session:
        while time.monotonic() < end_s:
            if (frame := next(newest)) is None:
                time.sleep(0.005)
                continue
            now = slot.prompt.value.decode(), slot.noise_scale.value
            if now[0] != asked[0] and now[0].strip():
                session.set_prompt(now[0], "recache")
            if now[1] != asked[1]:
                session.set_options(noise_scale=now[1])
            asked = now
            yield from session.push(frame[None])


def newest_frames(slot: Slot, fps: float) -> Iterator[np.ndarray | None]:
    """For ever: the camera's newest frame, or that of the sample clip; None while there is no other than before."""
    clip = list(read_video("sample"))
    seen, _ = slot.newest()
    start_s, camera_s, shown = time.monotonic(), float("-inf"), -1
    while True:
        count, frame = slot.newest()
        now_s = time.monotonic()
        playing = int((now_s - start_s) * fps)
        if count != seen:
            seen, camera_s = count, now_s
            yield frame
        elif playing != shown and now_s - camera_s > CAMERA_GONE_S:
            shown = playing
            yield resize_and_crop(clip[playing % len(clip)][None], slot.side, slot.side)[0]
        else:
            yield None


def failure_sentence(error: BaseException) -> str:
    """What to tell the viewer: one sentence, and one thing to do."""
    text = str(error).lower()
    if "quota" in text:
        space, copy = os.environ.get("SPACE_ID"), "duplicate this Space"
        if space:
            copy = f"[{copy}](https://huggingface.co/spaces/{space}?duplicate=true)"
        return f"**Your GPU time of today is used up.** Log in, come back tomorrow, or {copy} on a GPU of your own."
    if "no gpu" in text:
        return "**No GPU is free at the moment.** Press Start again in a minute."
    if "aborted" in text:
        return "**The GPU was taken back before its time.** Press Start again."
    if "out of memory" in text:
        return "**The GPU ran out of memory.** Press Start again."
    return "**The stream stopped in the model.** Press Start again."


def picture_html(jpeg: bytes, kind: str = "jpeg") -> str:
    """A picture inside its own address: no file is written for it."""
    return f'<img alt="Restyled picture" src="data:image/{kind};base64,{base64.b64encode(jpeg).decode()}">'


class Visits:
    """What the page's events do, each visitor in a slot of its own.

    Args:
        pipe: already on the GPU as ZeroGPU wants it: at import.
        spaces: the platform's package, imported before torch touched CUDA.
        seconds: GPU time asked for.
    """

    def __init__(self, pipe: StreamPipeline, spaces: Any, seconds: int) -> None:
        self._seconds = seconds
        self._pool = pool = SlotPool(NUM_SLOTS, min(pipe.preset.width, pipe.preset.height))

        @spaces.GPU(duration=seconds)
        def on_gpu(index: int, prompt: str, noise_scale: float) -> Iterator[bytes]:
            yield from map(encode_jpeg, stream_slot(pipe, pool.slots[index], prompt, noise_scale, seconds - 2))

        self._on_gpu = on_gpu

    def push(self, frame: np.ndarray | None, request: gr.Request) -> None:
        """A frame of the camera."""
        if frame is not None:
            self._pool.slots[self._pool.take(request.session_hash)].push(frame)

    def change(self, prompt: str, noise_scale: float, request: gr.Request) -> None:
        """Settings for the next chunk."""
        self._pool.slots[self._pool.take(request.session_hash)].ask(prompt, noise_scale)

    def run(self, prompt: str, noise_scale: float, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        """(picture, status) until the GPU time is over."""
        index = self._pool.take(request.session_hash)
        yield gr.skip(), f"Waiting for a GPU; it is yours for {self._seconds} s."
        start_s, said = None, None
        try:
            for jpeg in self._on_gpu(index, prompt, noise_scale):
                self._pool.take(request.session_hash)  # still in use
                start_s = start_s or time.monotonic()
                text = f"{max(0, self._seconds - 2 - int(time.monotonic() - start_s))} s of GPU time left."
                yield picture_html(jpeg), gr.skip() if text == said else text
                said = text
        except Exception as error:
            logger.warning("a stream on ZeroGPU ended: %s", error)
            yield gr.skip(), failure_sentence(error)
        else:
            yield gr.skip(), "The GPU time is over. Press Start to continue; the memory of the stream begins anew."

    def leave(self, request: gr.Request) -> None:
        """The page is gone."""
        self._pool.give_back(request.session_hash)


def build_ui(pipe: StreamPipeline, spaces: Any, *, seconds: int = SECONDS) -> gr.Blocks:
    """The page on ZeroGPU; arguments as for ``Visits``."""
    visits, noise_scale = Visits(pipe, spaces, seconds), pipe.preset.noise_scale
    prompts = {style["style"]: style["prompt"] for style in STYLES}
    with gr.Blocks(title="streamdiff live", analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.Markdown(
            "# streamdiff live\nYour video, repainted while it plays. Press Start: the sample clip is restyled, or "
            "your camera once it is on. Camera frames are processed in memory and not kept."
        )
        with gr.Row(elem_id="sd-zero-row"):
            with gr.Column(min_width=300):
                first = (STATIC / "gallery" / f"{FIRST_STYLE}.webp").read_bytes()
                picture = gr.HTML(picture_html(first, "webp"), elem_id="sd-zero-picture")
                with gr.Row():
                    start = gr.Button("Start", variant="primary", elem_id="sd-zero-start")
                    stop = gr.Button("Stop", elem_id="sd-zero-stop")
                status = gr.Markdown("Not running.", elem_id="sd-zero-status")
            with gr.Column(min_width=300):
                style = gr.Radio([(s["label"], s["style"]) for s in STYLES], value=FIRST_STYLE, label="Style")
                prompt = gr.Textbox(prompts[FIRST_STYLE], label="Prompt, applied with Enter", max_length=300)
                noise = gr.Slider(0.05, 1, noise_scale, step=0.05, label="Noise: true to the input ↔ free")
                camera = gr.Image(sources=["webcam"], streaming=True, type="numpy", label="Camera", format="jpeg")
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        camera.stream(visits.push, camera, None, stream_every=0.06, concurrency_limit=None, **quiet)
        running = start.click(visits.run, [prompt, noise], [picture, status], concurrency_limit=None, **quiet)
        stop.click(lambda: "Stopped.", None, status, cancels=[running], queue=False, **quiet)
        style.input(prompts.get, style, prompt, queue=False, **quiet).then(
            visits.change, [prompt, noise], None, queue=False, **quiet
        )
        for event in (prompt.submit, noise.release):
            event(visits.change, [prompt, noise], None, queue=False, **quiet)
        page.unload(visits.leave)
    return page


def page_settings() -> dict[str, Any]:
    """Arguments for ``Blocks.launch``: nothing from another host, no server in front, nothing of ours to upload."""
    theme = gr.themes.Soft(primary_hue="violet", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=["monospace"])
    for part in ("block_title", "block_label"):  # labels as plain text
        fill = {f"{part}_background_fill{mode}": "transparent" for mode in ("", "_dark")}
        theme.set(**fill, **{f"{part}_text_color{mode}": "*body_text_color" for mode in ("", "_dark")})
    theme.set(block_title_padding="0")
    return {"theme": theme, "css": STYLE, "footer_links": [], "ssr_mode": False, "max_file_size": "2mb"}
