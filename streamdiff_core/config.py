"""Frozen configuration: what a model is, what a stream keeps, and the named presets.

Nothing here imports torch, so ``list_presets()`` is instant. Numbers of the Wan models are SPEC §1.1; numbers of
the StreamDiffusionV2 stream (cache of 3 sinks + 3 rolling frames, steps 700/500/400/200, shift 8) are SPEC §2.1
and §4. The preset ``tiny`` is this project's own bundled model (``assets/tiny/MODEL_CARD.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

PositionMap = Literal["absolute", "packed", "slots", "ahead", "wrap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a causal Wan-style diffusion transformer (SPEC §1.1)."""

    dim: int
    """Width of the token stream."""
    ffn_dim: int
    """Hidden width of the feed-forward layers."""
    num_heads: int
    """Attention heads; ``dim / num_heads`` is the head dimension."""
    num_layers: int
    """Number of DiT blocks."""
    in_channels: int = 16
    """Latent channels in."""
    out_channels: int = 16
    """Latent channels out."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent (frames, rows, columns) per token; the first entry is always 1."""
    text_dim: int = 4096
    """Width of a prompt token."""
    text_len: int = 512
    """Prompt tokens after padding; all of them are attended to, as in Wan."""
    freq_dim: int = 256
    """Width of the timestep sinusoid."""
    eps: float = 1e-6
    """Epsilon of every norm."""
    prediction: Literal["velocity", "x0"] = "velocity"
    """What the network itself predicts; the sampler always sees velocities."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of num_heads {self.num_heads}")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: a token must belong to one latent frame, start with 1")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def rope_columns(self) -> tuple[int, int, int]:
        """Complex RoPE columns per head for (time, height, width): 22, 21, 21 of 64 in Wan (SPEC §1.6)."""
        half = self.head_dim // 2
        return half - 2 * (half // 3), half // 3, half // 3

    def tokens_per_frame(self, latent_height: int, latent_width: int) -> int:
        """Tokens of one latent frame."""
        return (latent_height // self.patch_size[1]) * (latent_width // self.patch_size[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Shape of the streaming VAE: 1 + 4n pixel frames <-> 1 + n latent frames."""

    latent_channels: int = 16
    """Channels of a latent frame."""
    spatial_stride: int = 8
    """Pixels per latent cell, each way."""
    temporal_stride: int = 4
    """Pixel frames per latent frame after the first."""
    width: int = 96
    """Hidden channels of the residual decoder."""
    num_blocks: int = 0
    """Causal residual blocks of the decoder; 0 leaves the closed-form linear VAE."""
    guide_width: int = 0
    """Hidden channels of the guided filter behind the decoder (``guided_filter``); 0: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Shape of the small bundled text encoder."""

    num_buckets: int = 4096
    """Rows of the hashed character n-gram table."""
    dim: int = 128
    """Width of a prompt token."""
    text_len: int = 16
    """Words kept; longer prompts are cut, shorter ones zero-padded."""
    num_layers: int = 1
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """What the rolling KV cache keeps and where it says things are (SPEC §2, SEEDS §2.1)."""

    sink_frames: int = 3
    """First latent frames of the stream that are never evicted."""
    window_frames: int = 3
    """Most recent latent frames kept, the current chunk included."""
    positions: PositionMap = "absolute"
    """Map from latent frame to temporal RoPE position."""
    refresh_at: int = 50
    """``wrap`` only: latent frame at which positions jump back to ``cache_frames - 1``."""
    slot_origins: tuple[int, int] = (0, 6)
    """``slots`` only: first position of the sinks and of the window."""
    ahead_frames: int = 30
    """``ahead`` only: how far the sinks sit in front of the newest frame."""
    adaptive_sink: Literal["off", "released", "paper"] = "off"
    """Sink refresh: ``released`` replaces the least similar sink, ``paper`` every sink below the threshold."""
    adaptive_threshold: float = 0.2
    """Cosine similarity below which a sink is stale."""

    def __post_init__(self) -> None:
        if self.sink_frames < 0 or self.window_frames < 1:
            raise ValueError(f"sink_frames {self.sink_frames} must be >= 0 and window_frames {self.window_frames} >= 1")
        if self.positions == "wrap" and self.refresh_at <= self.cache_frames - 1:
            raise ValueError(f"refresh_at {self.refresh_at} must exceed cache_frames - 1 = {self.cache_frames - 1}")

    @property
    def cache_frames(self) -> int:
        """Latent frames held: sinks + window."""
        return self.sink_frames + self.window_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseControllerConfig:
    """Parameters of the motion-aware noise controller (SPEC §3); the defaults are those of the released code."""

    enabled: bool = True
    """False: the noise scale stays at its initial value and motion is not measured."""
    form: Literal["released", "paper"] = "released"
    """What `decide` receives: pixel frames ("released") or latent frames ("paper")."""
    motion_scale: float = 0.2
    """RMS change per frame that counts as full motion, in units of frames in [-1, 1] (paper: sigma)."""
    noise_range: float = 0.1
    """How far full motion lowers the noise scale (paper: s_max - s_min)."""
    smoothing: float = 0.9
    """Weight of the new value in the running mean (paper: lambda); 1 = no memory."""
    max_noise_scale: float | None = None
    """Noise scale of a still scene (paper: s_max); None = the stream's initial noise scale."""
    window_frames: int = 4
    """Paper form only: how many latest frame changes the maximum is taken over (paper: k)."""
    timestep_offset: int = 100
    """The model is told ``1000 * noise_scale - timestep_offset``: less noise than was added,
    as the released weights are used; 0 for a model trained to be told the truth."""

    def __post_init__(self) -> None:
        if self.form not in ("released", "paper"):
            raise ValueError(f"form={self.form!r} is unknown, use 'released' or 'paper'")
        if self.motion_scale <= 0 or not 0 < self.smoothing <= 1 or self.window_frames < 1:
            raise ValueError(
                f"need motion_scale > 0, 0 < smoothing <= 1 and window_frames >= 1, got {self.motion_scale}, "
                f"{self.smoothing}, {self.window_frames}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SteadyConfig:
    """When a shown pixel follows the new picture (``steady.hold_still``)."""

    moved_levels: float = 4.0
    """Change of the input, grey levels, at which half of the new picture is taken."""
    changed_levels: float = 30.0
    """Change of the output, grey levels, at which half of the new picture is taken even of still input."""
    min_gain: float = 0.1
    """Share of the new picture that is always taken; a still picture settles in 1 / min_gain frames."""

    def __post_init__(self) -> None:
        if min(self.moved_levels, self.changed_levels) <= 0 or not 0 < self.min_gain <= 1:
            raise ValueError(
                f"need moved_levels > 0, changed_levels > 0 and 0 < min_gain <= 1, got {self.moved_levels}, "
                f"{self.changed_levels}, {self.min_gain}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SeamConfig:
    """Seams between cells of a picture that ``deblock.deblock_`` smooths."""

    period_px: int
    """Side of a cell."""
    largest_step: float
    """Steps of so many grey levels are edges and left alone; smaller ones are spread, the more the smaller."""
    reach_px: int
    """Pixels on either side over which a step is spread."""

    def __post_init__(self) -> None:
        if not 2 <= self.reach_px <= self.period_px / 2 or self.largest_step <= 0:
            raise ValueError(
                f"need largest_step > 0 and 2 <= reach_px <= period_px / 2, got {self.largest_step}, "
                f"{self.reach_px}, {self.period_px}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Which denoising steps a chunk goes through (SPEC §4)."""

    timesteps: tuple[float, ...] = (700.0, 500.0, 400.0, 200.0)
    """Step list; ``steps=N`` takes the first N. Empty: evenly spaced from the first timestep down."""
    default_steps: int = 2
    """Steps when the caller does not say."""
    kind: str = "stream_batch"
    """``stream_batch`` or ``sequential``."""
    clean_pass: bool = False
    """One more forward per chunk at timestep 0 that only rewrites the cache (sequential only)."""
    use_sigma_table: bool = True
    """Look sigma up in the shifted table of the reference (grid error 3e-4) instead of ``timestep / 1000``."""
    shift: float = 8.0
    """Shift of that table."""
    noise: Literal["fresh", "fixed"] = "fresh"
    """``fresh`` draws new noise per chunk; ``fixed`` keeps a position's noise, so still input stays still."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """Where the weights of a full-size preset come from (SPEC §8)."""

    repo: str
    """Hugging Face hub repository of the transformer."""
    file: str
    """Checkpoint in it."""
    wrapper: str | None = None
    """Entry of the pickled dict to take; None: the usual order."""
    base: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """Repository of the VAE, the text encoder and its tokenizer (the same for all sizes of Wan2.1)."""
    raw_latents: bool = False
    """Whether the transformer reads the VAE's means without normalisation (StreamDiffusionV2, SPEC §5.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Everything ``StreamPipeline.from_preset`` needs to know."""

    name: str
    """Exact name."""
    summary: str
    """One sentence for lists and the command line."""
    model: ModelConfig
    """The transformer."""
    vae: VAEConfig
    """The streaming VAE."""
    text: TextConfig | None = None
    """The bundled text encoder; None where umT5 is used."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Rolling cache."""
    noise: NoiseControllerConfig = field(default_factory=NoiseControllerConfig)
    """Noise controller."""
    noise_scale: float = 0.8
    """Default amount of noise put on the input: 0 keeps it, 1 forgets it."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Denoising steps."""
    steady: SteadyConfig | None = None
    """When still pixels are held; None: by default they are not, every picture is shown as decoded, as in the paper."""
    seams: tuple[SeamConfig, ...] = ()
    """Seams smoothed after decoding, smallest cells first."""
    grain_levels: float = 0.0
    """Noise that guided pictures have on flat ground, grey levels; taken off again (``wiener``)."""
    width: int = 832
    """Default output width in pixels."""
    height: int = 480
    """Default output height in pixels."""
    fps: float = 16.0
    """Frame rate the model was trained at."""
    text_to_video: bool = True
    """Whether ``mode="t2v"`` makes sense with these weights."""
    bundled: bool = False
    """Whether the weights ship with the package."""
    source: WeightSource | None = None
    """Where they are downloaded from otherwise."""
    latent_frames_per_chunk: int = 1
    """Latent frames denoised together; given by the weights."""


WAN_1_3B = ModelConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

TINY_MODEL = ModelConfig(
    dim=256, ffn_dim=1024, num_heads=4, num_layers=6, in_channels=48, out_channels=48,
    text_dim=128, text_len=16, freq_dim=256, prediction="x0",
)  # fmt: skip

FULL_CONTEXT = CacheConfig(sink_frames=0, window_frames=21)
"""The 21 latent frames that the Self Forcing family was trained with (SEEDS §3.1)."""
CLEAN_CONTEXT = ScheduleConfig(
    timesteps=(1000.0, 937.5, 833.3, 625.0), default_steps=4, kind="sequential", clean_pass=True, shift=5.0
)
"""Four steps warped by shift 5, and a clean pass that writes the cache (SEEDS §2)."""

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        name="tiny",
        summary="Bundled 7 M model: live restyling at 256x256 on a laptop CPU. Not trained for text-to-video.",
        model=TINY_MODEL,
        vae=VAEConfig(latent_channels=48, width=128, num_blocks=3, guide_width=48),
        text=TextConfig(dim=128, text_len=16),
        cache=CacheConfig(sink_frames=1, window_frames=3, positions="packed"),
        noise=NoiseControllerConfig(timestep_offset=0),
        noise_scale=0.45,
        schedule=ScheduleConfig(timesteps=(), use_sigma_table=False, noise="fixed"),
        steady=SteadyConfig(),
        seams=(  # the VAE's patches, the transformer's tokens
            SeamConfig(period_px=8, largest_step=12.0, reach_px=2),
            SeamConfig(period_px=16, largest_step=30.0, reach_px=4),
        ),
        grain_levels=2.0,
        width=256,
        height=256,
        text_to_video=False,
        bundled=True,
    ),
    "wan-1.3b": Preset(
        name="wan-1.3b",
        summary="StreamDiffusionV2 1.3B weights (Wan2.1, causal); needs a GPU and a download.",
        model=WAN_1_3B,
        vae=VAEConfig(),
        cache=CacheConfig(positions="wrap", adaptive_sink="released"),
        source=WeightSource(
            repo="jerryfeng/StreamDiffusionV2", file="wan_causal_dmd_v2v/model.pt", raw_latents=True
        ),
    ),
    "wan-14b": Preset(
        name="wan-14b",
        summary="StreamDiffusionV2 14B weights (CausVid-Plus); needs a large GPU and a download.",
        model=WAN_14B,
        vae=VAEConfig(),
        cache=CacheConfig(positions="wrap", adaptive_sink="released"),
        schedule=ScheduleConfig(default_steps=1),
        source=WeightSource(
            repo="jerryfeng/StreamDiffusionV2", file="wan_causal_dmd_v2v_14b/model.pt", raw_latents=True
        ),
    ),
    "causvid-1.3b": Preset(
        name="causvid-1.3b",
        summary="CausVid 1.3B (text to video, chunks of 3); needs a GPU and a download; non-commercial.",
        model=WAN_1_3B,
        vae=VAEConfig(),
        cache=FULL_CONTEXT,
        schedule=replace(CLEAN_CONTEXT, timesteps=(1000.0, 757.0, 522.0), default_steps=3, shift=8.0),
        source=WeightSource(repo="tianweiy/CausVid", file="autoregressive_checkpoint/model.pt"),
        latent_frames_per_chunk=3,
    ),
    "self-forcing-1.3b": Preset(
        name="self-forcing-1.3b",
        summary="Self Forcing 1.3B (text to video, chunks of 3); needs a GPU and a download.",
        model=WAN_1_3B,
        vae=VAEConfig(),
        cache=FULL_CONTEXT,
        schedule=CLEAN_CONTEXT,
        source=WeightSource(
            repo="gdhe17/Self-Forcing", file="checkpoints/self_forcing_dmd.pt", wrapper="generator_ema"
        ),
        latent_frames_per_chunk=3,
    ),
    "causal-forcing-1.3b": Preset(
        name="causal-forcing-1.3b",
        summary="Causal Forcing 1.3B (text to video, frame by frame); needs a GPU and a download.",
        model=WAN_1_3B,
        vae=VAEConfig(),
        cache=FULL_CONTEXT,
        schedule=CLEAN_CONTEXT,
        source=WeightSource(
            repo="zhuhz22/Causal-Forcing", file="framewise/causal_forcing.pt", wrapper="generator_ema"
        ),
    ),
}  # fmt: skip


def list_presets() -> list[str]:
    """Names accepted by ``StreamPipeline.from_preset``."""
    return list(PRESETS)


def get_preset(name: str) -> Preset:
    """The preset called exactly ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]
