"""How fast a machine should be before anything was measured: the seed of every ``LatencyModel``.

    ms of a call = launches * launch_us + (FLOPs / peak + bytes / bandwidth) / efficiency

FLOPs are SPEC §0. Bytes and launches were counted like them, on meta tensors: inputs plus outputs of every eager
operation of one steady chunk of 4 frames, attention counted as fused (diffusers ``AutoencoderKLWan`` and
``WanTransformer3DModel``; this library's own modules for ``tiny``). Peaks and bandwidths are the makers' dense
figures; ``launch_us`` is what an extra unbatched forward costs in the paper's stream-batch ablation on H100
(fig. 15: 35.2 ms on average, 1.4 of them weights), spread over its 2672 launches. ``efficiency`` is the one fitted
constant, from one figure per machine: 1.3B, 480p, one step (``tiny``: one step). Everything else follows;
``tests/test_roofline.py`` holds the paper's figures against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff_core.latency_model import LatencyModel, Line


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the roofline needs to know of one accelerator (or CPU)."""

    name: str
    """Name in figures."""
    peak_flops: float
    """Dense FLOP per second of the number type used."""
    bandwidth_bytes_per_s: float
    """Memory traffic it sustains on paper."""
    efficiency: float
    """Share of both that eager PyTorch reaches: the fitted constant."""
    launch_us: float = 12.6
    """Host time per operation; does not depend on the batch. 0 where the device is so slow that it hides."""
    num_replicas: int = 1
    """Copies of the machine, each with its own model; a stream stays on one of them."""
    max_rows: int = 16
    """Rows one forward may hold (memory)."""

    def __post_init__(self) -> None:
        if min(self.peak_flops, self.bandwidth_bytes_per_s, self.efficiency) <= 0 or self.launch_us < 0:
            raise ValueError(f"peak, bandwidth and efficiency of {self.name!r} must be > 0 and launch_us >= 0")


@dataclass(frozen=True, slots=True)
class Work:
    """What one stage does; a unit is one latent frame (4 pixel frames) of one row."""

    tflop: float
    """10^12 FLOP per unit, 2 per multiply-add."""
    gigabytes: float
    """10^9 bytes moved per unit."""
    weight_gigabytes: float
    """10^9 bytes read per call."""
    launches: int
    """Operations started per call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One model at one picture size."""

    name: str
    """Name in figures."""
    encode: Work
    """VAE encoder, per stream."""
    denoise: Work
    """One forward of the transformer with a full cache."""
    decode: Work
    """VAE decoder, per stream."""


_VAE = {
    "480p": (Work(8.05, 69.59, 0.0, 337), Work(13.55, 120.41, 0.0, 454)),
    "512": (Work(5.27, 45.53, 0.0, 337), Work(8.88, 78.91, 0.0, 454)),
}
_DIT = {
    ("wan-1.3b", "480p"): Work(6.74, 30.06, 2.89, 2672),
    ("wan-1.3b", "512"): Work(3.82, 20.13, 2.87, 2672),
    ("wan-14b", "480p"): Work(49.9, 125.45, 28.65, 3552),
    ("wan-14b", "512"): Work(30.1, 84.09, 28.62, 3552),
}

WORKLOADS: dict[str, Workload] = {
    f"{model} {size}": Workload(name=f"{model} {size}", encode=_VAE[size][0], denoise=dit, decode=_VAE[size][1])
    for (model, size), dit in _DIT.items()
} | {
    "tiny 256": Workload(
        name="tiny 256",
        encode=Work(75.5e-6, 0.073, 0.0, 23),
        denoise=Work(4.531e-3, 0.221, 0.011, 596),
        decode=Work(2.202e-3, 0.119, 0.0, 74),
    )
}

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        # GEMM peak and in-cache copy (where tiny's activations live) measured on two cores of an AMD EPYC
        Machine(name="2-core CPU", peak_flops=0.442e12, bandwidth_bytes_per_s=90e9, efficiency=0.52),
        # a forward of one row (84 ms) takes longer than starting it (34 ms); no memory for a second row (SPEC §9.2);
        # the efficiency is high because 72 MB of L2 keep much of what the count sends to memory
        Machine(
            name="RTX 4090",
            peak_flops=165.2e12,
            bandwidth_bytes_per_s=1.008e12,
            efficiency=0.84,
            launch_us=0.0,
            max_rows=1,
        ),  # fmt: skip
        # SPEC §9.4: 989 is the dense figure, the paper's 1979 counts sparsity
        Machine(name="H100", peak_flops=989e12, bandwidth_bytes_per_s=3.35e12, efficiency=0.63),
        # dense bfloat16; nothing published to fit, so H100's efficiency is assumed
        Machine(name="B200", peak_flops=2250e12, bandwidth_bytes_per_s=8e12, efficiency=0.63),
        Machine(name="4xH100", peak_flops=989e12, bandwidth_bytes_per_s=3.35e12, efficiency=0.63, num_replicas=4),
    )
}


def seed_line(work: Work, machine: Machine) -> Line:
    """Cost of one stage on one machine."""
    terabytes_per_s = machine.bandwidth_bytes_per_s / 1e12
    unit_ms = 1e15 * work.tflop / machine.peak_flops + work.gigabytes / terabytes_per_s
    weights_ms = work.weight_gigabytes / terabytes_per_s
    fixed_ms = 1e-3 * machine.launch_us * work.launches + weights_ms / machine.efficiency
    return Line(fixed_ms, unit_ms / machine.efficiency)


def seed_model(workload: Workload, machine: Machine) -> LatencyModel:
    """A latency model to start from; measurements correct it."""
    return LatencyModel(
        {stage: seed_line(getattr(workload, stage), machine) for stage in ("encode", "denoise", "decode")}
    )


def chunk_ms(model: LatencyModel, steps: int, *, batched: bool = True) -> float:
    """Steady time of one chunk of a single stream: encode, all steps, decode.

    Args:
        model: cost per stage.
        steps: denoising steps.
        batched: as one forward of ``steps`` rows (stream batch) or as ``steps`` forwards of one row.
    """
    denoise = model.ms("denoise", steps, 1) if batched else steps * model.ms("denoise", 1, 1)
    return model.ms("encode", 1, 1) + denoise + model.ms("decode", 1, 1)
