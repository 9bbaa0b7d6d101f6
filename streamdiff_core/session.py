"""One live stream: frames in, restyled frames out, everything it remembers in one object.

``push`` takes any number of frames and returns what became ready; ``flush`` returns the rest, after which frames out
equal frames in. The stages are public (``encode_chunk``, ``denoise_chunk``, ``decode_chunk``) and ``push`` is only
their composition. State lives here and nowhere else: VAE memory, KV cache, schedule, noise average, last frame
(SPEC §2.8 lists what goes wrong otherwise).

Chunks: the first holds 1 + 4n pixel frames, later ones 4n (n latent frames). A shorter tail is padded by repeating
its last frame and the padding is cut from the output; upstream drops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.config import CacheConfig
from streamdiff_core.flow import nearest_table_sigma, select_steps, sigma_from_timestep, sigma_table, spaced_steps
from streamdiff_core.frames import check_frames, frames_to_tensor, resize_and_crop, tensor_to_frames
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.noise_controller import decide
from streamdiff_core.schedules import SCHEDULES
from streamdiff_core.schedules.steps import NoiseSource, Stepper
from streamdiff_core.timing import LatencyTracker, StageTimer
from streamdiff_core.types import (
    Chunk,
    DecodedChunk,
    DenoisedChunk,
    DenoiseSchedule,
    Emit,
    EncodedChunk,
    Fork,
    ForwardOp,
    RowOp,
    StreamClosedError,
)

if TYPE_CHECKING:
    from streamdiff_core.attention import PromptContext
    from streamdiff_core.pipeline import StreamPipeline

Prompt = str | Mapping[str, float]
SWITCHES = ("keep", "recache", "flush", "reset")
KEPT_ON_FLUSH = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """Everything a caller may choose for one stream."""

    seed: int = 0
    """Seed of all noise."""
    steps: int = 2
    """Denoising steps per chunk."""
    noise_scale: float = 0.5
    """Amount of noise put on the input, [0, 1]."""
    motion_adaptive: bool = True
    """Whether motion lowers the noise scale."""
    schedule: str = "stream_batch"
    """Name of the denoise schedule."""
    clean_pass: bool = False
    """Sequential only: rewrite the cache with clean latents after each chunk."""
    policy: str = "sink"
    """Name of the KV policy."""
    cache: CacheConfig = CacheConfig()
    """Sinks, window, positions."""
    width: int = 256
    """Output width, px."""
    height: int = 256
    """Output height, px."""
    latent_frames_per_chunk: int = 1
    """Latent frames denoised together after the first chunk's extra one."""
    mode: str = "v2v"
    """``v2v`` or ``t2v``."""
    deadline_ms: float | None = None
    """Latency above which a frame counts as a deadline miss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamStats:
    """Snapshot of a stream's figures; NaN where nothing was measured yet."""

    ttff_ms: float
    """First frame in to first frame out."""
    fps: float
    """Pixel frames per second after warm-up."""
    latency_p50_ms: float
    """Median time from a frame's push to its output."""
    latency_p95_ms: float
    """95th percentile."""
    latency_p99_ms: float
    """99th percentile."""
    jitter_ms: float
    """RMS deviation of output intervals from even pacing."""
    deadline_miss_rate: float
    """Share of frames later than the deadline."""
    stage_ms: dict[str, float]
    """Mean milliseconds per call of each stage."""
    num_frames_in: int
    """Frames pushed."""
    num_frames_out: int
    """Frames returned."""
    cache_slots: list[dict[str, Any]]
    """Filled slots of the last cache row: slot, role, frame, position."""
    nbytes: int
    """Bytes of stream state."""
    noise_scale: float
    """Noise scale of the latest chunk."""
    motion: float
    """Motion score of the latest chunk."""


class StreamSession:
    """One stream on a ``StreamPipeline``; made by ``pipe.start``."""

    def __init__(self, pipe: StreamPipeline, prompt: Prompt, options: StreamOptions) -> None:
        self.pipe, self.options = pipe, options
        self.timer = StageTimer(pipe.device)
        self._latency = LatencyTracker(deadline_ms=options.deadline_ms)
        self._num_in = self._num_out = 0
        self._closed = False
        self._prompt = pipe.encode_prompt(prompt)
        self._switch: str | None = None
        self._table = sigma_table(pipe.preset.schedule.shift) if pipe.preset.schedule.use_sigma_table else None
        self._begin_stream()

    def _begin_stream(self) -> None:
        """All state of the stream, fresh."""
        o, pipe = self.options, self.pipe
        self.schedule = self._new_schedule()
        stride = pipe.preset.vae.spatial_stride
        self._latent_size = (o.height // stride, o.width // stride)
        self.cache = KVCache(
            pipe.transformer.config,
            POLICIES[o.policy](o.cache),
            num_rows=self.schedule.num_cache_rows,
            tokens_per_frame=pipe.transformer.config.tokens_per_frame(*self._latent_size),
            dtype=pipe.transformer.dtype,
            device=pipe.device,
        )
        self._encoder_state, self._decoder_state = pipe.vae.new_state(), pipe.vae.new_state()
        self._pending: list[np.ndarray] = []
        self._chunk_idx = self._next_frame = 0
        self._previous: Tensor | None = None
        self._noise_scale, self._motion = o.noise_scale, 0.0
        self._recent: tuple[float, ...] = ()
        self._num_real: dict[int, int] = {}
        self._inputs: list[dict[int, tuple[Tensor, float]]] = [{} for _ in range(self.schedule.num_cache_rows)]
        self._switch_at: dict[int, str] = {}
        self._spare = np.empty((0, o.height, o.width, 3), np.uint8)

    def _new_schedule(self) -> DenoiseSchedule:
        o = self.options
        stepper = Stepper(NoiseSource(o.seed, self.pipe.preset.schedule.noise), self.sigma_of)
        kwargs = {"clean_pass": o.clean_pass} if o.schedule == "sequential" else {}
        return SCHEDULES[o.schedule](stepper, o.steps, **kwargs)

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
            out += self._advance(self.encode_chunk(np.stack(taken)))
        return self._deliver(out)

    def flush(self) -> np.ndarray:
        """Everything still in flight, uint8 [T', height, width, 3]; afterwards frames out == frames in."""
        self._check_open()
        out = []
        if self._pending:
            count = len(self._pending)
            padded = self._pending + [self._pending[-1]] * (self._frames_wanted - count)
            self._pending = []
            out += self._advance(self.encode_chunk(np.stack(padded), num_frames=count))
        while self.schedule.num_in_flight:
            out += self._advance(None)
        return self._deliver(out)

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
            out += self._advance(EncodedChunk(chunk))
        while self.schedule.num_in_flight:
            out += self._advance(None)
        clip = np.concatenate(out)
        self._spare = clip[num_frames:].copy()
        return self._deliver([clip[:num_frames]])

    def set_prompt(self, prompt: Prompt, on_switch: str = "keep") -> None:
        """Change the prompt from the next chunk on; chunks before it, in flight or not, do not notice.

        A cache row switches when the first chunk with the new prompt reaches it, so a stream batch switches row
        by row. Of several calls between two chunks the last one counts.

        Args:
            prompt: text, or {text: weight} to mix.
            on_switch: ``keep`` the cache; ``recache`` it (one joint forward per cache row over what it holds,
                new prompt, SEEDS §3.3); ``flush`` all but the sinks and the last two frames (SEEDS §3.5);
                ``reset``: finish what is in flight, then go on with an empty cache.

        Raises:
            ValueError: unknown ``on_switch``.
        """
        self._check_open()
        if on_switch not in SWITCHES:
            raise ValueError(f"unknown on_switch {on_switch!r}; use one of {', '.join(SWITCHES)}")
        self._prompt = self.pipe.encode_prompt(prompt)
        self._switch = on_switch

    def close(self) -> None:
        """Free the stream's state; later calls raise ``StreamClosedError``."""
        self._closed = True
        self.cache = self.schedule = self._encoder_state = self._decoder_state = None
        self._pending, self._inputs, self._previous = [], [], None

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of stream state: KV cache, VAE memory, inputs kept for re-caching."""
        self._check_open()
        kept = sum(x.numel() * x.element_size() for row in self._inputs for x, _ in row.values())
        return self.cache.nbytes + self._decoder_state.nbytes + self._encoder_state.nbytes + kept

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
            cache_slots=self.cache.describe(self.cache.num_rows - 1),
            nbytes=self.nbytes,
            noise_scale=self._noise_scale,
            motion=self._motion,
        )

    # --- the stages -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_chunk(self, frames: np.ndarray, num_frames: int | None = None) -> EncodedChunk:
        """Frames of exactly one chunk -> latents, noise scale and timesteps.

        Args:
            frames: uint8 [T, height, width, 3], T = 1 + 4n for the first chunk, 4n later.
            num_frames: how many of them are real (the rest is padding); default all.
        """
        with self.timer.stage("border", self._chunk_idx):
            pixels = frames_to_tensor(frames).to(self.pipe.device)
        with self.timer.stage("encode", self._chunk_idx):
            latents = self.pipe.vae.encode(pixels, self._encoder_state)[0]
        noise_scale, timesteps = self._decide_noise(pixels[0], latents)
        chunk = self._new_chunk(latents, noise_scale, timesteps, len(frames) if num_frames is None else num_frames)
        return EncodedChunk(chunk)

    @torch.inference_mode()
    def denoise_chunk(self, encoded: EncodedChunk | None) -> list[DenoisedChunk]:
        """Run the schedule for one chunk (None: flush one tick); returns the chunks that became ready."""
        chunk, done = None if encoded is None else encoded.chunk, []
        if chunk is not None:
            done = self._begin_switch(chunk)
            chunk.prompt = self._prompt
            self._num_real[chunk.chunk_idx] = chunk.num_frames
        with self.timer.stage("denoise", None if chunk is None else chunk.chunk_idx):
            return done + self._tick(chunk)

    @torch.inference_mode()
    def decode_chunk(self, denoised: DenoisedChunk) -> DecodedChunk:
        """Latents of one chunk -> uint8 frames [T, height, width, 3], padding removed. Chunks come in order."""
        with self.timer.stage("decode", denoised.chunk_idx):
            pixels = self.pipe.vae.decode(denoised.latents[None], self._decoder_state)
        with self.timer.stage("border", denoised.chunk_idx):
            frames = tensor_to_frames(pixels)[: denoised.num_frames]
        return DecodedChunk(denoised.chunk_idx, frames)

    def sigma_of(self, timestep: float) -> float:
        """Noise level the model works with at a timestep (the reference looks it up in a table, SPEC §4)."""
        if self._table is None:
            return sigma_from_timestep(timestep)
        return nearest_table_sigma(timestep, self._table)

    # --- inside ---------------------------------------------------------------------------------------------

    @property
    def _frames_wanted(self) -> int:
        """Pixel frames of the next chunk."""
        group = self.pipe.preset.vae.temporal_stride * self.options.latent_frames_per_chunk
        return group + (1 if self._next_frame == 0 else 0)

    def _advance(self, encoded: EncodedChunk | None) -> list[np.ndarray]:
        return [self.decode_chunk(d).frames for d in self.denoise_chunk(encoded)]

    def _deliver(self, clips: list[np.ndarray]) -> np.ndarray:
        empty = np.empty((0, self.options.height, self.options.width, 3), np.uint8)
        for clip in clips:
            self._latency.ready(len(clip))
        out = np.concatenate([empty, *clips])
        self._num_out += len(out)
        return out

    def _decide_noise(self, pixels: Tensor, latents: Tensor) -> tuple[float, tuple[float, ...]]:
        """Noise scale and timesteps of the next chunk (SPEC §3)."""
        o, schedule = self.options, self.pipe.preset.schedule
        config = replace(self.pipe.preset.noise, enabled=o.motion_adaptive)
        seen = latents if config.form == "paper" else pixels
        rest = select_steps(schedule.timesteps, o.steps)[1:] if schedule.timesteps else []
        decision = decide(
            seen,
            self._previous,
            self._noise_scale,
            config=config,
            initial_noise_scale=o.noise_scale,
            next_timestep=rest[0] if rest else None,
            recent_distances=self._recent,
        )
        self._previous, self._recent = seen[-1].clone(), decision.recent_distances
        self._noise_scale, self._motion = decision.noise_scale, decision.motion
        first = float(decision.first_timestep)
        return decision.noise_scale, tuple([first, *rest] if rest else spaced_steps(first, o.steps))

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
            motion=self._motion,
            descriptor=describe_content(latents) if self.options.cache.adaptive_sink != "off" else None,
        )
        self._next_frame += len(latents)
        self._chunk_idx += 1
        return chunk

    def _empty_chunk(self) -> Chunk:
        """Text to video: pure noise at timestep 1000."""
        n = self.options.latent_frames_per_chunk + (1 if self._next_frame == 0 else 0)
        shape = (n, self.pipe.transformer.config.in_channels, *self._latent_size)
        stride = self.pipe.preset.vae.temporal_stride
        dtype = torch.promote_types(torch.float32, self.pipe.transformer.dtype)
        count = stride * n - (stride - 1 if self._next_frame == 0 else 0)
        nothing = torch.zeros(shape, device=self.pipe.device, dtype=dtype)
        return self._new_chunk(nothing, 1.0, tuple(spaced_steps(1000.0, self.options.steps)), count)

    def _tick(self, chunk: Chunk | None) -> list[DenoisedChunk]:
        """Carry out what the schedule asks for, once per chunk."""
        events, reply, done = self.schedule.push(chunk), None, []
        while True:
            try:
                event = events.send(reply)
            except StopIteration:
                return done
            reply = None
            if isinstance(event, ForwardOp):
                reply = self._forward(event.rows)
            elif isinstance(event, Fork):
                self._fork(event)
            elif isinstance(event, Emit):
                num_frames = self._num_real.pop(event.chunk_idx)
                self._switch_at.pop(event.chunk_idx, None)
                done.append(DenoisedChunk(event.chunk_idx, event.latents, num_frames))

    def _forward(self, rows: list[RowOp]) -> list[Tensor]:
        for row in rows:
            self._switch_row(row)
        x0s = self.pipe.engine.forward([(self.cache, row) for row in rows])
        for row in rows:
            self._keep_inputs(row)
        return x0s

    def _keep_inputs(self, row: RowOp) -> None:
        """Remember what was fed for every frame the cache row holds, for ``recache``."""
        kept = self._inputs[row.cache_row]
        times = row.timestep if isinstance(row.timestep, tuple) else (row.timestep,) * len(row.frame_ids)
        kept.update({f: (row.xt[j], times[j]) for j, f in enumerate(row.frame_ids)})
        held = set(self.cache.tables[row.cache_row].frames)
        for frame in [f for f in kept if f not in held]:
            del kept[frame]

    def _fork(self, fork: Fork) -> None:
        self.cache.fork(fork.src, fork.dst)
        for row in fork.dst:
            self._inputs[row] = dict(self._inputs[fork.src])

    def _begin_switch(self, chunk: Chunk) -> list[DenoisedChunk]:
        """A prompt switch starts with this chunk; a reset first finishes what is in flight."""
        switch, self._switch, done = self._switch, None, []
        if switch == "reset":
            while self.schedule.num_in_flight:
                done += self._tick(None)
            self.schedule = self._new_schedule()
            self.cache.clear()
            self._inputs = [{} for _ in self._inputs]
        elif switch in ("flush", "recache"):
            self._switch_at[chunk.chunk_idx] = switch
        return done

    def _switch_row(self, row: RowOp) -> None:
        """Switch a cache row when the first chunk of the new prompt reaches it, and only then."""
        switch = self._switch_at.get(row.chunk_idx)
        if switch is None or self.cache.tables[row.cache_row].slots_of(row.frame_ids[0]):
            return
        if switch == "flush":
            self.cache.keep_recent(KEPT_ON_FLUSH, rows=(row.cache_row,))
        elif self._inputs[row.cache_row]:
            self.pipe.engine.forward([(self.cache, self._recache_row(row.cache_row, row.prompt))])

    def _recache_row(self, cache_row: int, prompt: PromptContext) -> RowOp:
        frames = sorted(self._inputs[cache_row])
        inputs = [self._inputs[cache_row][f] for f in frames]
        return RowOp(
            xt=torch.stack([x for x, _ in inputs]), sigma=0.0, timestep=tuple(t for _, t in inputs),
            frame_ids=tuple(frames), cache_row=cache_row, chunk_idx=-1, step=0, prompt=prompt, kind="recache",
        )  # fmt: skip

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosedError("this stream is closed; start a new one with pipe.start(prompt)")

    def recipe(self) -> dict[str, Any]:
        """The options as plain values, for logs and recipes."""
        return asdict(self.options)


def describe_content(latents: Tensor, grid: int = 4) -> np.ndarray:
    """Unit vector of what a chunk shows: its clean latents [F, C, h, w], averaged over frames on a 4 x 4 grid.

    Source: the chunk embedding h_t of paper §3.2; upstream compares rotated keys per layer (SPEC §2.6).
    """
    pooled = F.adaptive_avg_pool2d(latents.float().mean(0), grid).flatten()
    return (pooled / pooled.norm().clamp_min(1e-6)).cpu().numpy()
