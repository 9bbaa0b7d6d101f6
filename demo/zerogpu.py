"""The live stream where no socket may use the GPU: Hugging Face ZeroGPU, which lends one per Gradio event.

The camera's frames go through ``gr.Image`` streaming into a slot of memory shared with the worker; one long generator
event holds the GPU, reads the newest frame (of the sample clip while no camera is on), and yields pictures, which go
to the page inside its events and never through a file. Slots are made at import, before any worker is forked: a worker
sees only memory that existed then. About half the rate of the socket; there is no recording here.
"""

from __future__ import annotations

import base64
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np

from demo.session import encode_jpeg
from demo.ui import FIRST_STYLE, STATIC, STYLES, SYSTEM_FONTS
from streamdiff_core import StreamPipeline
from streamdiff_core.frames import resize_and_crop
from streamdiff_core.video_io import read_video

logger = logging.getLogger(__name__)

NUM_SLOTS = 8
SECONDS = 30
"""GPU time asked for at a press of Start; the daily quota is minutes."""
PROMPT_BYTES = 600
CAMERA_GONE_S = 1.0
"""Without a camera frame for so long the sample clip plays."""
UNUSED_S = 60.0
"""A page that did nothing for so long gives its slot to the next when all are lent."""
STYLE = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
#sd-zero-row { flex-wrap: wrap; }
#sd-zero-picture, #sd-zero-picture .html-container { padding: 0 !important; }
#sd-zero-picture img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 10px; }
#sd-zero-status { min-height: 24px; }
"""


@dataclass(slots=True)
class Slot:
    """The newest frame and the wishes of one viewer, in memory shared between processes."""

    side: int
    pixels: Any = field(init=False)
    count: Any = field(init=False)
    prompt: Any = field(init=False)
    noise_scale: Any = field(init=False)

    def __post_init__(self) -> None:
        self.pixels = multiprocessing.Array("B", self.side * self.side * 3)
        self.count = multiprocessing.Value("q", 0)
        self.prompt = multiprocessing.Array("c", PROMPT_BYTES)
        self.noise_scale = multiprocessing.Value("d", 0.0)

    def push(self, frame: np.ndarray) -> None:
        """Newest wins: uint8 [H, W, 3] in place of the one before."""
        small = resize_and_crop(np.ascontiguousarray(frame[None, ..., :3]), self.side, self.side)[0]
        with self.pixels.get_lock():
            np.frombuffer(self.pixels.get_obj(), np.uint8)[:] = small.ravel()
            self.count.value += 1

    def newest(self) -> tuple[int, np.ndarray]:
        """(frames pushed so far, the newest one [side, side, 3])."""
        with self.pixels.get_lock():
            pixels = np.frombuffer(self.pixels.get_obj(), np.uint8).reshape(self.side, self.side, 3).copy()
            return self.count.value, pixels

    def ask(self, prompt: str, noise_scale: float) -> None:
        """Settings for the next chunk."""
        self.prompt.value = prompt.encode()[: PROMPT_BYTES - 1].decode(errors="ignore").encode()
        self.noise_scale.value = noise_scale

    def clear(self) -> None:
        """Nothing of one viewer is left for the next."""
        with self.pixels.get_lock():
            np.frombuffer(self.pixels.get_obj(), np.uint8)[:] = 0
            self.count.value = 0


class SlotPool:
    """A fixed number of slots, each lent to one page by its session hash."""

    def __init__(self, num_slots: int, side: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots = [Slot(side) for _ in range(num_slots)]
        self._owners: dict[str, tuple[int, float]] = {}  # slot, when it was last used
        self._clock, self._lock = clock, threading.Lock()

    def take(self, owner: str) -> int:
        """Index of the owner's slot, a free one at first.

        Raises:
            gr.Error: all are lent.
        """
        with self._lock:
            if owner not in self._owners:
                self._owners[owner] = self._free_slot(), 0.0
            index = self._owners[owner][0]
            self._owners[owner] = index, self._clock()
            return index

    def give_back(self, owner: str) -> None:
        """The page is gone."""
        with self._lock:
            if owner in self._owners:
                self.slots[self._owners.pop(owner)[0]].clear()

    def _free_slot(self) -> int:
        lent = {index for index, _ in self._owners.values()}
        if len(lent) == len(self.slots):  # perhaps a last frame came in after its page had left
            owner, (index, used_s) = min(self._owners.items(), key=lambda item: item[1][1])
            if self._clock() - used_s < UNUSED_S:
                raise gr.Error("The server is full. Try again in a minute, or duplicate this Space.")
            del self._owners[owner]
            self.slots[index].clear()
            return index
        return min(set(range(len(self.slots))) - lent)


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


def build_ui(pipe: StreamPipeline, spaces: Any, *, seconds: int = SECONDS) -> gr.Blocks:
    """The page on ZeroGPU.

    Args:
        pipe: already on the GPU as ZeroGPU wants it: at import.
        spaces: the platform's package, imported before torch touched CUDA.
    """
    preset = pipe.preset
    pool = SlotPool(NUM_SLOTS, min(preset.width, preset.height))
    prompts = {style["style"]: style["prompt"] for style in STYLES}

    @spaces.GPU(duration=seconds)
    def on_gpu(index: int, prompt: str, noise_scale: float) -> Iterator[bytes]:
        yield from map(encode_jpeg, stream_slot(pipe, pool.slots[index], prompt, noise_scale, seconds - 2))

    def push(frame: np.ndarray | None, request: gr.Request) -> None:
        if frame is not None:
            pool.slots[pool.take(request.session_hash)].push(frame)

    def change(prompt: str, noise_scale: float, request: gr.Request) -> None:
        pool.slots[pool.take(request.session_hash)].ask(prompt, noise_scale)

    def run(prompt: str, noise_scale: float, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        index = pool.take(request.session_hash)
        yield gr.skip(), f"Waiting for a GPU; it is yours for {seconds} s."
        start_s, said = None, None
        try:
            for jpeg in on_gpu(index, prompt, noise_scale):
                pool.take(request.session_hash)  # still in use
                start_s = start_s or time.monotonic()
                text = f"{max(0, seconds - 2 - int(time.monotonic() - start_s))} s of GPU time left."
                yield picture_html(jpeg), gr.skip() if text == said else text
                said = text
        except Exception as error:
            logger.warning("a stream on ZeroGPU ended: %s", error)
            yield gr.skip(), failure_sentence(error)
        else:
            yield gr.skip(), "The GPU time is over. Press Start to continue; the memory of the stream begins anew."

    def leave(request: gr.Request) -> None:
        pool.give_back(request.session_hash)

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
                noise = gr.Slider(0.05, 1, preset.noise_scale, step=0.05, label="Noise: true to the input ↔ free")
                camera = gr.Image(sources=["webcam"], streaming=True, type="numpy", label="Camera", format="jpeg")
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        camera.stream(push, camera, None, stream_every=0.06, concurrency_limit=None, **quiet)
        running = start.click(run, [prompt, noise], [picture, status], concurrency_limit=None, **quiet)
        stop.click(lambda: "Stopped.", None, status, cancels=[running], queue=False, **quiet)
        style.input(prompts.get, style, prompt, queue=False, **quiet).then(
            change, [prompt, noise], None, queue=False, **quiet
        )
        for event in (prompt.submit, noise.release):
            event(change, [prompt, noise], None, queue=False, **quiet)
        page.unload(leave)
    return page


def page_settings() -> dict[str, Any]:
    """Arguments for ``Blocks.launch``: nothing from another host, no server in front, nothing of ours to upload."""
    theme = gr.themes.Soft(primary_hue="violet", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=["monospace"])
    for part in ("block_title", "block_label"):  # labels as plain text
        fill = {f"{part}_background_fill{mode}": "transparent" for mode in ("", "_dark")}
        theme.set(**fill, **{f"{part}_text_color{mode}": "*body_text_color" for mode in ("", "_dark")})
    theme.set(block_title_padding="0")
    return {"theme": theme, "css": STYLE, "footer_links": [], "ssr_mode": False, "max_file_size": "2mb"}
