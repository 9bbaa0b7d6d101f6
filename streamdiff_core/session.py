"""One live stream: frames in, restyled frames out, everything it remembers in one object.

``push`` takes any number of frames and returns what became ready; ``flush`` returns the rest, after which frames out
equal frames in. The stages are public (``encode_chunk``, ``denoise_chunk``, ``decode_chunk``) and ``push`` is only
their composition; ``work`` is ``push`` with its forwards left to the caller, who may join those of many streams.
State lives here and nowhere else: VAE memory, KV cache, schedule, noise average, last frame (SPEC §2.8 lists what
goes wrong otherwise).

Chunks: the first holds 1 + 4n pixel frames, later ones 4n (n latent frames). A shorter tail is padded by repeating
its last frame and the padding is cut from the output; upstream drops it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.attention import PromptContext
from streamdiff_core.chunk_decoder import ChunkDecoder
from streamdiff_core.chunk_noise import ChunkNoise
from streamdiff_core.denoiser import Denoiser
from streamdiff_core.device_streams import InTurn, StageStreams
from streamdiff_core.frames import check_frames, frames_to_tensor, resize_and_crop
from streamdiff_core.inputs import HeldFrames, make_inputs
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.kv_policies.sink import describe_content
from streamdiff_core.lockstep import Work, run_alone
from streamdiff_core.prompt_fade import PromptFade
from streamdiff_core.stream_options import SWITCHES, Prompt, StreamOptions, StreamStats, change_options
from streamdiff_core.timing import LatencyTracker, StageTimer
from streamdiff_core.types import (
    Chunk,
    DecodedChunk,
    DenoisedChunk,
    DenoiseSchedule,
    EncodedChunk,
    RowOp,
    StreamClosedError,
)

if TYPE_CHECKING:
    from streamdiff_core.pipeline import StreamPipeline


class StreamSession:
    """One stream on a ``StreamPipeline``; made by ``pipe.start``."""

    denoiser_type: type[Denoiser] = Denoiser

    def __init__(self, pipe: StreamPipeline, prompt: Prompt, options: StreamOptions) -> None:
        self.pipe, self.options = pipe, options
        self.timer = StageTimer(pipe.device)
        self._latency = LatencyTracker(deadline_ms=options.deadline_ms)
        self._num_in = self._num_out = 0
        self._closed = False
        self._prompt = pipe.encode_prompt(prompt)
        self._switch: str | None = None
        self._fade: PromptFade | None = None
        self._begin_stream()

    def _begin_stream(self) -> None:
        """All state of the stream, fresh."""
        o, pipe = self.options, self.pipe
        stride = pipe.preset.vae.spatial_stride
        self._latent_size = (o.height // stride, o.width // stride)
        tokens = pipe.transformer.config.tokens_per_frame(*self._latent_size)
        self._denoiser = self.denoiser_type(pipe.engine, pipe.preset, o, tokens)
        self._inputs, self._held = make_inputs(o.input_options), HeldFrames()
        for rule in self._inputs.rules:
            rule.begin(o.seed, pipe.encode_prompt)
        self._denoiser.guide = self._inputs.guide
        self._options_taken = o
        self._streams = StageStreams(pipe.device) if pipe.overlap_stages else InTurn()
        self._encoder_state = pipe.vae.new_state()
        self._decoder = self._make_decoder()
        self._pending: list[np.ndarray] = []
        self._chunk_idx = self._next_frame = 0
        self._noise = ChunkNoise(pipe.preset, o.noise_scale)
        self._evicted: set[int] = set()
        self._spare = np.empty((0, o.height, o.width, 3), np.uint8)

    # --- frames in, frames out ------------------------------------------------------------------------------

    def push(self, frames: np.ndarray) -> np.ndarray:
        """Feed frames, get back whatever became ready.

        Args:
            frames: uint8 [T, H, W, 3], T >= 1; resized and centre-cropped once to the stream's size.

        Returns:
            uint8 [T', height, width, 3], T' >= 0. Any split of a clip gives the same frames, bit for bit.

        Raises:
            ValueError: wrong type, shape or size.
            StreamClosedError: after ``close``.
        """
        return self._run(self.work(frames))

    @torch.inference_mode()
    def work(self, frames: np.ndarray) -> Work[np.ndarray]:
        """As ``push``, but whoever drives it computes the rows: those of many streams may share a forward."""
        self._check_open()
        if self.options.mode == "t2v":
            raise ValueError("a text-to-video stream takes no frames; call generate(num_frames=…)")
        check_frames(frames)
        if len(frames) == 0 or min(frames.shape[1:3]) < 64:
            raise ValueError(f"need at least one frame of at least 64x64 pixels, got {list(frames.shape)}")
        self._latency.arrive(len(frames))
        self._num_in += len(frames)
        with self.timer.stage("border"):
            self._pending.extend(resize_and_crop(frames, self.options.width, self.options.height))
        out = []
        while len(self._pending) >= self._frames_wanted:
            count = self._frames_wanted
            taken, self._pending = self._pending[:count], self._pending[count:]
            out += yield from self._take(np.stack(taken))
        return self._deliver(out)

    def flush(self) -> np.ndarray:
        """Everything still in flight, uint8 [T', height, width, 3]; afterwards frames out == frames in."""
        self._check_open()
        out = []
        if self._pending:
            count = len(self._pending)
            padded = self._pending + [self._pending[-1]] * (self._frames_wanted - count)
            self._pending = []
            out += self._run(self._take(np.stack(padded), count))
        while self.schedule.num_in_flight:
            out += self._run(self._advance(None))
        return self._deliver(out + self._decoded())

    def generate(self, num_frames: int) -> np.ndarray:
        """Text to video: the next ``num_frames`` frames of the stream, uint8 [T, height, width, 3].

        Whole chunks are made; what the last one holds beyond ``num_frames`` waits for the next call.

        Raises:
            ValueError: not a text-to-video stream, or fewer than one frame asked for.
        """
        self._check_open()
        if self.options.mode != "t2v":
            raise ValueError('generate needs a session started with mode="t2v"')
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        self._latency.arrive(num_frames)
        out, missing = [self._spare], num_frames - len(self._spare)
        while missing > 0:
            chunk = self._empty_chunk()
            missing -= chunk.num_frames
            out += self._run(self._advance(EncodedChunk(chunk)))
        while self.schedule.num_in_flight:
            out += self._run(self._advance(None))
        clip = np.concatenate(out + self._decoded())
        self._spare = clip[num_frames:].copy()
        return self._deliver([clip[:num_frames]])

    def set_prompt(self, prompt: Prompt, on_switch: str = "keep") -> None:
        """Change the prompt from the next chunk on; chunks before it, in flight or not, do not notice.

        A cache row switches when the first chunk with the new prompt reaches it, so a stream batch switches row
        by row. Of several calls between two chunks the last one counts.

        Args:
            prompt: text, or {text: weight} to mix.
            on_switch: ``keep`` the cache; ``recache`` it (one joint forward per cache row over what it holds,
                new prompt, SEEDS §3.3); ``flush`` all but the sinks and the last two frames, one if the window
                is 3 or shorter (SEEDS §3.5); ``reset``: finish what is in flight, then go on with an empty cache;
                ``cut``: tell the policy that the scene changes here, for policies with a rule for it; ``fade``: keep
                the cache and slide to the new prompt over up to 18 latent frames (SEEDS §3.10).

        Raises:
            ValueError: unknown ``on_switch``, or one the policy has no rule for.
        """
        self._check_open()
        if on_switch not in SWITCHES:
            raise ValueError(f"unknown on_switch {on_switch!r}; use one of {', '.join(SWITCHES)}")
        if on_switch not in ("fade", *POLICIES[self.options.policy].switches):
            known = ", ".join(name for name, cls in POLICIES.items() if on_switch in cls.switches)
            raise ValueError(f"policy {self.options.policy!r} has no rule for on_switch={on_switch!r}; use {known}")
        before, self._prompt = self._prompt_at(self._next_frame), self.pipe.encode_prompt(prompt)
        self._fade = PromptFade(before, self._prompt, self._next_frame) if on_switch == "fade" else None
        self._switch = "keep" if on_switch == "fade" else on_switch

    def set_options(self, **changes: Any) -> None:
        """Change options of the running stream from the next chunk on; none of its frames is lost or repeated.

        ``noise_scale``, ``motion_adaptive`` and ``seed`` simply hold for the next chunks, ``deadline_ms`` for the
        next frames out. For ``steps``, ``schedule``, ``clean_pass``, ``policy`` and ``cache`` (or its fields by
        name) what is in flight is finished first and comes out with the next chunk, which then leaves at once too.
        The cache is carried over (``KVCache.take_over``); another policy, and more steps after a single one, start with
        an empty one. VAE memory, frame numbers, noise average and prompt go on.

        Raises:
            ValueError: unknown option, a value that cannot work, or one of width, height, mode and
                latent_frames_per_chunk, which need a new stream. The stream is then as before.
        """
        self._check_open()
        self.options = change_options(self.options, changes, self.pipe.preset)
        self._latency.deadline_ms = self.options.deadline_ms

    def close(self) -> None:
        """Free the stream's state; later calls raise ``StreamClosedError``."""
        self._closed = True
        self._denoiser = self._encoder_state = self._decoder = None
        self._noise.forget()
        self._pending = []

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def schedule(self) -> DenoiseSchedule:
        """The stream's denoise schedule."""
        self._check_open()
        return self._denoiser.schedule

    @property
    def cache(self) -> KVCache:
        """The stream's KV cache."""
        self._check_open()
        return self._denoiser.cache

    def newest_row(self, cache_row: int = -1) -> RowOp:
        """The forward that last wrote the newest chunk into a cache row, to be repeated or looked at.

        Raises:
            ValueError: the cache holds nothing yet.
        """
        row = range(self.cache.num_rows)[cache_row]
        held = sorted({f for f in self.cache.tables[row].frames if f is not None and f >= 0})
        if not held:
            raise ValueError("the cache is empty: push at least one chunk first")
        frames = [f for f in held if f > held[-1] - self.options.latent_frames_per_chunk]
        return self._denoiser.recache_row(row, self._prompt, frames)

    @property
    def nbytes(self) -> int:
        """Bytes of stream state: KV cache, VAE memory, inputs kept for re-caching, frames in flight."""
        self._check_open()
        return sum(part.nbytes for part in (self._denoiser, self._encoder_state, self._decoder, self._inputs))

    @property
    def noise_scale(self) -> float:
        """Noise scale of the latest chunk."""
        return self._noise.noise_scale

    @property
    def motion(self) -> float:
        """Motion score of the latest chunk."""
        return self._noise.motion

    @property
    def stats(self) -> StreamStats:
        """Figures of the stream so far."""
        self._check_open()
        latency = self._latency.summary()
        return StreamStats(
            ttff_ms=latency.ttff_ms,
            fps=latency.fps,
            latency_p50_ms=latency.p50_ms,
            latency_p95_ms=latency.p95_ms,
            latency_p99_ms=latency.p99_ms,
            jitter_ms=latency.interval_jitter_ms,
            deadline_miss_rate=latency.deadline_miss_rate,
            stage_ms={name: stage.mean_ms for name, stage in self.timer.summary().items()},
            num_frames_in=self._num_in,
            num_frames_out=self._num_out,
            num_frames_held=self._held.num_held,
            cache_slots=self.cache.describe(self.cache.num_rows - 1),
            cache_evicted=sorted(self._evicted),
            nbytes=self.nbytes,
            noise_scale=self.noise_scale,
            motion=self.motion,
        )

    # --- the stages -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_chunk(self, frames: np.ndarray, num_frames: int | None = None) -> EncodedChunk:
        """Frames of exactly one chunk -> latents, noise scale and timesteps.

        Args:
            frames: uint8 [T, height, width, 3], T = 1 + 4n for the first chunk, 4n later.
            num_frames: how many of them are real (the rest is padding); default all.

        Raises:
            ValueError: frames of another size than the stream's.
        """
        check_frames(frames, (self.options.width, self.options.height))
        with self._streams.stage("encode"):
            with self.timer.stage("border", self._chunk_idx):
                pixels = frames_to_tensor(frames).to(self.pipe.device)
            with self.timer.stage("encode", self._chunk_idx):
                latents = self.pipe.vae.encode(pixels, self._encoder_state)[0]
            self._decoder.remember(self._chunk_idx, pixels[0], self.options)
            timesteps = self._noise.decide(pixels[0], latents, self.options)
            count = len(frames) if num_frames is None else num_frames
            chunk = self._new_chunk(latents, self.noise_scale, timesteps, count)
        self._streams.hand_over("encode", latents)
        return EncodedChunk(chunk)

    @torch.inference_mode()
    def denoise_chunk(self, encoded: EncodedChunk | None) -> list[DenoisedChunk]:
        """Run the schedule for one chunk (None: flush one tick); returns the chunks that became ready."""
        return self._run(self._denoise(encoded))

    def _denoise(self, encoded: EncodedChunk | None) -> Work[list[DenoisedChunk]]:
        chunk, switch = None if encoded is None else encoded.chunk, None
        if chunk is not None:
            chunk.prompt, switch, self._switch = self._prompt_at(chunk.frame_ids[-1]), self._switch, None
        held = self._frames_held()
        with self.timer.stage("denoise", None if chunk is None else chunk.chunk_idx):
            done = yield from self._denoiser.work(chunk, switch)
        self._evicted = held - self._frames_held()
        return done

    @torch.inference_mode()
    def decode_chunk(self, denoised: DenoisedChunk) -> DecodedChunk:
        """Latents of one chunk -> uint8 frames [T, height, width, 3], padding removed. Chunks come in order."""
        return self._decoder.decode(denoised, self.options)

    # --- inside ---------------------------------------------------------------------------------------------

    def _make_decoder(self) -> ChunkDecoder:
        return ChunkDecoder(self.pipe.vae, self.pipe.preset, self._streams, self.timer)

    def _decoded(self, but: int = 0) -> list[np.ndarray]:
        """Frames of all chunks being decoded but the newest few."""
        return self._with_held(self._decoder.finished(but))

    def _with_held(self, chunks: Iterable[DecodedChunk]) -> list[np.ndarray]:
        """Frames of the chunks, and of those that an input rule held back after them."""
        return [clip for chunk in chunks for clip in self._held.after(chunk.chunk_idx, chunk.frames)]

    @property
    def _frames_wanted(self) -> int:
        """Pixel frames of the next chunk."""
        stride = self.pipe.preset.vae.temporal_stride
        return stride * self._latent_frames_wanted - (stride - 1 if self._next_frame == 0 else 0)

    @property
    def _latent_frames_wanted(self) -> int:
        """Latent frames of the next chunk."""
        n = self.options.latent_frames_per_chunk
        return self._inputs.first_chunk_frames(n) if self._next_frame == 0 else n

    def _prompt_at(self, frame_idx: int) -> PromptContext:
        """The prompt of a chunk that ends with this latent frame."""
        return self._prompt if self._fade is None else self._fade.at(frame_idx)

    def _frames_held(self) -> set[int]:
        return {frame for frame in self._denoiser.cache.tables[-1].frames if frame is not None}

    @torch.inference_mode()
    def _run(self, work: Work[Any]) -> Any:
        return run_alone(work, self.pipe.engine.forward)

    def _advance(self, encoded: EncodedChunk | None) -> Work[list[np.ndarray]]:
        done = yield from self._denoise(encoded)
        if done:
            yield []  # end of a stage
        if not self._streams.delay_chunks:
            return self._with_held(self.decode_chunk(d) for d in done)
        for denoised in done:
            self._decoder.start(denoised, self.options)
        return self._decoded(but=self._streams.delay_chunks)

    def _take(self, frames: np.ndarray, num_frames: int | None = None) -> Work[list[np.ndarray]]:
        """Process a chunk, or hold it back where an input rule says so; chunks in flight go on either way."""
        something_changed = self._switch is not None or self.options is not self._options_taken
        if self._inputs.holds(frames, must_run=something_changed):
            self._held.add(self._chunk_idx - 1, len(frames) if num_frames is None else num_frames)
            return [*(yield from self._advance(None)), *self._held.due()]
        self._options_taken = self.options
        encoded = self.encode_chunk(frames, num_frames)
        yield []  # end of a stage
        return (yield from self._advance(encoded))

    def _deliver(self, clips: list[np.ndarray]) -> np.ndarray:
        empty = np.empty((0, self.options.height, self.options.width, 3), np.uint8)
        for clip in clips:
            self._latency.ready(len(clip))
        out = np.concatenate([empty, *clips])
        self._num_out += len(out)
        return out

    def _new_chunk(self, latents: Tensor, noise_scale: float, timesteps: tuple[float, ...], count: int) -> Chunk:
        frame_ids = tuple(range(self._next_frame, self._next_frame + len(latents)))
        chunk = Chunk(
            chunk_idx=self._chunk_idx,
            frame_ids=frame_ids,
            latents=latents,
            noise_scale=noise_scale,
            timesteps=timesteps,
            prompt=self._prompt,
            num_frames=count,
            motion=self.motion,
            options=self.options,
            descriptor=describe_content(latents) if self.options.cache.adaptive_sink != "off" else None,
        )
        self._next_frame += len(latents)
        self._chunk_idx += 1
        return chunk

    def _empty_chunk(self) -> Chunk:
        """Text to video: pure noise at timestep 1000."""
        n = self._latent_frames_wanted
        shape = (n, self.pipe.transformer.config.in_channels, *self._latent_size)
        stride = self.pipe.preset.vae.temporal_stride
        dtype = torch.promote_types(torch.float32, self.pipe.transformer.dtype)
        count = stride * n - (stride - 1 if self._next_frame == 0 else 0)
        nothing = torch.zeros(shape, device=self.pipe.device, dtype=dtype)
        return self._new_chunk(nothing, 1.0, self._noise.from_pure_noise(self.options.steps), count)

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosedError("this stream is closed; start a new one with pipe.start(prompt)")

    def recipe(self) -> dict[str, Any]:
        """The options as plain values, for logs and recipes."""
        return asdict(self.options)
