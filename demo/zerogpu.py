"""The live stream where no socket may use the GPU: Hugging Face ZeroGPU, which lends one per Gradio event.

The camera's frames go through ``gr.Image`` streaming into a slot of memory shared with the worker; one long generator
event holds the GPU, reads the newest frame, and yields pictures. Slots are made at import, before any worker is
forked: a worker sees only memory that existed then. About half the rate of the socket; there is no recording here.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np

from streamdiff_core import StreamPipeline
from streamdiff_core.frames import resize_and_crop

NUM_SLOTS = 8
SECONDS = 30
"""GPU time asked for at a press of Start; the daily quota is minutes."""
PROMPT_BYTES = 600


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

    def __init__(self, num_slots: int, side: int) -> None:
        self.slots = [Slot(side) for _ in range(num_slots)]
        self._owners: dict[str, int] = {}

    def take(self, owner: str) -> int:
        """Index of the owner's slot, a free one at first.

        Raises:
            gr.Error: all are lent.
        """
        if owner not in self._owners:
            free = sorted(set(range(len(self.slots))) - set(self._owners.values()))
            if not free:
                raise gr.Error("The server is full. Try again in a minute, or duplicate this Space.")
            self._owners[owner] = free[0]
        return self._owners[owner]

    def give_back(self, owner: str) -> None:
        """The page is gone."""
        if (index := self._owners.pop(owner, None)) is not None:
            self.slots[index].clear()


def stream_slot(pipe: StreamPipeline, slot: Slot, prompt: str, noise_scale: float, seconds: float) -> Iterator[Any]:
    """One stream over a slot: pictures uint8 [side, side, 3] until the time is up; repeated frames are not computed."""
    slot.ask(prompt, noise_scale)
    end_s, seen, asked = time.monotonic() + seconds, 0, (prompt, noise_scale)
    with pipe.start(prompt, noise_scale=noise_scale, width=slot.side, height=slot.side) as session:
        while time.monotonic() < end_s:
            count, frame = slot.newest()
            if count == seen:
                time.sleep(0.005)
                continue
            seen = count
            now = slot.prompt.value.decode(), slot.noise_scale.value
            if now[0] != asked[0] and now[0].strip():
                session.set_prompt(now[0], "recache")
            if now[1] != asked[1]:
                session.set_options(noise_scale=now[1])
            asked = now
            yield from session.push(frame[None])


def failure_sentence(error: BaseException) -> str:
    """What to tell the viewer."""
    text = str(error).lower()
    if "quota" in text or "gpu task aborted" in text or "no gpu" in text:
        return "The GPU time of today is used up. Log in, wait, or duplicate this Space on a GPU of your own."
    if "out of memory" in text:
        return "The GPU ran out of memory. Press Start again."
    return "The stream stopped in the model. Press Start again."


def build_ui(pipe: StreamPipeline, spaces: Any, *, seconds: int = SECONDS) -> gr.Blocks:
    """The page on ZeroGPU.

    Args:
        pipe: already on the GPU as ZeroGPU wants it: at import.
        spaces: the platform's package, imported before torch touched CUDA.
    """
    preset = pipe.preset
    pool = SlotPool(NUM_SLOTS, min(preset.width, preset.height))

    @spaces.GPU(duration=seconds)
    def on_gpu(index: int, prompt: str, noise_scale: float) -> Iterator[np.ndarray]:
        yield from stream_slot(pipe, pool.slots[index], prompt, noise_scale, seconds - 2)

    def push(frame: np.ndarray | None, request: gr.Request) -> None:
        if frame is not None:
            pool.slots[pool.take(request.session_hash)].push(frame)

    def change(prompt: str, noise_scale: float, request: gr.Request) -> None:
        pool.slots[pool.take(request.session_hash)].ask(prompt, noise_scale)

    def run(prompt: str, noise_scale: float, request: gr.Request) -> Iterator[tuple[Any, str]]:
        index = pool.take(request.session_hash)
        yield gr.skip(), f"Waiting for a GPU; it is yours for {seconds} s."
        try:
            for picture in on_gpu(index, prompt, noise_scale):
                yield picture, ""
        except Exception as error:
            yield gr.skip(), failure_sentence(error)
        else:
            yield gr.skip(), "The GPU time is over. Press Start to continue; the memory of the stream begins anew."

    def leave(request: gr.Request) -> None:
        pool.give_back(request.session_hash)

    with gr.Blocks(title="streamdiff live", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown("# streamdiff live\nFrames are processed in memory and not kept.")
        with gr.Row():
            camera = gr.Image(sources=["webcam"], streaming=True, type="numpy", label="Camera", format="jpeg")
            picture = gr.Image(streaming=True, label="Restyled", format="jpeg", interactive=False)
        prompt = gr.Textbox("comic book panel, flat colours and bold ink", label="Prompt", max_length=300)
        noise = gr.Slider(0.05, 1, preset.noise_scale, step=0.05, label="Noise")
        status = gr.Markdown("")
        start = gr.Button("Start", variant="primary")
        camera.stream(push, camera, None, stream_every=0.06, concurrency_limit=None, show_progress="hidden")
        start.click(run, [prompt, noise], [picture, status], show_progress="hidden", concurrency_limit=None)
        for event in (prompt.submit, noise.release):
            event(change, [prompt, noise], None, queue=False, show_progress="hidden")
        page.unload(leave)
    return page
