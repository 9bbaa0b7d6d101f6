"""What a caller may choose for one stream, what a stream reports, and which choices cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from streamdiff_core.config import CacheConfig, Preset
from streamdiff_core.inputs import make_inputs
from streamdiff_core.kv_policies import make_policy
from streamdiff_core.plain_data import check_fields, from_plain
from streamdiff_core.schedules import make_schedule
from streamdiff_core.schedules.steps import Stepper

Prompt = str | Mapping[str, float]
SWITCHES = ("keep", "recache", "flush", "reset", "cut", "fade")
FIXED_OPTIONS = ("width", "height", "mode", "latent_frames_per_chunk", "input_options")
"""Options that no running stream can change."""


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
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    """The schedule's knobs, plain values; as ``list_mechanisms()`` names them."""
    clean_pass: bool = False
    """Rewrite the cache with clean latents after each chunk, where the schedule offers it."""
    policy: str = "sink"
    """Name of the KV policy."""
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    """Knobs of the policy by name; plain values, so that a recipe can hold them."""
    cache: CacheConfig = CacheConfig()
    """Sinks, window, positions."""
    width: int = 256
    """Output width, px."""
    height: int = 256
    """Output height, px."""
    latent_frames_per_chunk: int = 1
    """Latent frames denoised together after the first chunk's extra one."""
    input_options: Mapping[str, Any] = field(default_factory=dict)
    """Rules of the input side and their knobs, {rule: {knob: value}}; as ``list_mechanisms()`` names them."""
    steady: bool = False
    """Whether what stands still in the input is held still (``steady.hold_still``); t2v has no input to hold to."""
    guided: bool = False
    """Whether decoded pictures get the edges of the input (``guided_filter``); only with a VAE that has learned it."""
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
    num_frames_held: int
    """Frames for which the last picture was repeated because an input rule held them back."""
    cache_slots: list[dict[str, Any]]
    """Filled slots of the last cache row: slot, role, frame, position."""
    cache_evicted: list[int]
    """Latent frames that the last cache row held before the latest chunk and holds no more."""
    nbytes: int
    """Bytes of stream state."""
    noise_scale: float
    """Noise scale of the latest chunk."""
    motion: float
    """Motion score of the latest chunk."""


def check_options(options: StreamOptions, preset: Preset) -> None:
    """Refuse options that cannot work, in one sentence each."""
    check_fields(options)
    o, multiple = options, preset.vae.spatial_stride * preset.model.patch_size[1]
    most = len(preset.schedule.timesteps) or 4
    if not 1 <= o.steps <= most:
        raise ValueError(f"steps must be between 1 and {most}, got {o.steps}")
    if not 0 < o.noise_scale <= 1:
        raise ValueError(f"noise_scale must lie in (0, 1], got {o.noise_scale}; 0.5 is a good start")
    if o.width % multiple or o.height % multiple or min(o.width, o.height) < 64:
        raise ValueError(f"width and height must be multiples of {multiple} from 64 on, got {o.width}x{o.height}")
    if o.guided and not preset.vae.guide_width:
        raise ValueError(f"preset {preset.name!r} has no guided filter; leave out guided=True")
    policy = make_policy(o.policy, o.cache, o.policy_options)
    unused = Stepper(noise=None, sigma_of=None)
    schedule = make_schedule(o.schedule, unused, o.steps, clean_pass=o.clean_pass, options=o.schedule_options)
    if o.mode not in ("v2v", "t2v"):
        raise ValueError(f"mode must be 'v2v' or 't2v', got {o.mode!r}")
    if o.mode == "t2v" and not preset.text_to_video:
        raise ValueError(f"preset {preset.name!r} is not trained for text-to-video; push frames with mode='v2v'")
    room, together = min(o.cache.window_frames, o.cache.cache_frames - 1), schedule.cost.chunks_per_row
    if not 1 <= o.latent_frames_per_chunk <= room:
        raise ValueError(
            f"latent_frames_per_chunk must be between 1 and {room}, got {o.latent_frames_per_chunk}: a chunk must fit "
            f"the window of {o.cache.window_frames} latent frames, and the first one, which has one more, the cache "
            f"of {o.cache.cache_frames}; raise window_frames"
        )
    if o.latent_frames_per_chunk * together > room:
        raise ValueError(
            f"{o.schedule} denoises {together} chunks together, {o.latent_frames_per_chunk * together} latent frames, "
            f"which must fit the window of {o.cache.window_frames} and, with one more at the start, the cache of "
            f"{o.cache.cache_frames}; raise window_frames, or lower steps where they say how many"
        )
    policy.check(o.latent_frames_per_chunk * together)
    first = make_inputs(o.input_options, has_frames=o.mode == "v2v").first_chunk_frames(o.latent_frames_per_chunk)
    first += o.latent_frames_per_chunk * (together - 1)
    if first > o.cache.cache_frames:
        raise ValueError(
            f"a first forward of {first} latent frames must fit the cache of {o.cache.cache_frames}; raise sink_frames "
            f"or window_frames, or shorten the warm-up"
        )
    if o.deadline_ms is not None and o.deadline_ms <= 0:
        raise ValueError(f"deadline_ms must be above 0, or None for no deadline, got {o.deadline_ms}")


def change_options(options: StreamOptions, changes: Mapping[str, Any], preset: Preset) -> StreamOptions:
    """The options of a running stream with some of them changed.

    Args:
        changes: fields of ``StreamOptions``; those of ``CacheConfig`` may be named directly.

    Raises:
        ValueError: unknown name, an option that a running stream cannot change, or a value that cannot work.
    """
    own, cache_fields = ({f.name for f in fields(kind)} for kind in (StreamOptions, CacheConfig))
    for name, value in changes.items():
        if name not in own | cache_fields:
            free = ", ".join(sorted((own | cache_fields).difference(FIXED_OPTIONS)))
            raise ValueError(f"unknown option {name!r}; a running stream can change {free}")
        if name in FIXED_OPTIONS and value != getattr(options, name):
            raise ValueError(f"{name} cannot change while a stream runs; start a new stream with {name}={value!r}")
    changed = replace(options, **{name: value for name, value in changes.items() if name in own})
    check_fields(changed)
    cache_changes = {name: value for name, value in changes.items() if name in cache_fields}
    if cache_changes:
        changed = replace(changed, cache=from_plain(CacheConfig, asdict(changed.cache) | cache_changes, "cache"))
    check_options(changed, preset)
    return changed
