"""Says whether this installation works and what it can run: what ``streamdiff doctor`` does.

Each check is one function that returns a sentence or raises; only failed ``required`` ones make the whole fail.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamdiff_core import native_kernels
from streamdiff_core.bench_frames import FrameLoop, moving_frames
from streamdiff_core.config import PRESETS, Preset
from streamdiff_core.forecast import forecast, machine_of, work_of
from streamdiff_core.machine import machine_facts
from streamdiff_core.memory_need import memory_need, ways_to_fit
from streamdiff_core.pipeline import ASSETS, StreamPipeline
from streamdiff_core.random_weights import random_pipeline
from streamdiff_core.types import CheckpointError
from streamdiff_core.video_io import probe, read_video, sample_clip_path

SHA256_FILE = "SHA256SUMS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the doctor's report."""

    name: str
    """What was looked at."""
    ok: bool
    """Whether it is as it should be."""
    detail: str
    """What was found, or what to do."""
    required: bool = True
    """Whether the installation fails without it."""


def examine(assets: Path = ASSETS, speed_budget_s: float = 2.0) -> dict[str, Any]:
    """Look at everything; ``ok`` is False when a required check failed."""
    facts = machine_facts()
    checks = [*_machine_checks(facts)]
    checks.append(_check("weights", lambda: check_weights(assets / "tiny")))
    checks.append(_check("sample clip", check_sample))
    checks += [_check(f"preset {name}", lambda p=preset: judge_preset(p, facts), required=False)
               for name, preset in PRESETS.items() if not preset.bundled]  # fmt: skip
    checks.append(_check("preset tiny", lambda: measure_tiny(assets / "tiny", speed_budget_s)))
    return {
        "ok": all(check.ok for check in checks if check.required),
        "machine": facts,
        "checks": [asdict(check) for check in checks],
    }


def _check(name: str, look: Callable[[], str], required: bool = True) -> Check:
    try:
        return Check(name=name, ok=True, detail=look(), required=required)
    except Exception as error:  # whatever is wrong is the finding
        text = " ".join(str(error).split()) or type(error).__name__
        return Check(name=name, ok=False, detail=text, required=required)


def _machine_checks(facts: dict[str, Any]) -> Iterator[Check]:
    versions = f"Python {facts['python']}, PyTorch {facts['torch']}, PyAV {facts['pyav'] or 'missing'}"
    missing = "" if facts["pyav"] else "; pip install av"
    yield Check(name="versions", ok=bool(facts["pyav"]), detail=versions + missing)
    bf16 = "bfloat16 in hardware" if facts["cpu_has_bf16"] else "no bfloat16 instructions, float32 is used"
    if native_kernels.runs_here():
        bf16 += ", C++ kernels" if facts["cpu_kernels"] else "; install g++ and the transformer is a third faster"
    threads = f"{facts['cpu_cores']} cores, {facts['torch_threads']} threads"
    yield Check(name="CPU", ok=True, detail=f"{facts['cpu']}, {threads}, {bf16}")
    memory = f"{facts['memory_free_gb']} of {facts['memory_gb']} GB free"
    yield Check(name="memory", ok=facts["memory_free_gb"] >= 1, detail=memory, required=False)
    cards = ", ".join(f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in facts["gpus"])
    yield Check(name="GPU", ok=bool(cards), detail=cards or "none that PyTorch sees; the CPU is used", required=False)


def check_weights(folder: Path) -> str:
    """Load all bundled weights, and compare with ``SHA256SUMS`` (lines of ``sha256sum``) when there is one.

    Raises:
        CheckpointError: says which file is missing, damaged or altered, and the remedy.
    """
    remedy = "install streamdiff again, or get a complete checkout"
    try:
        StreamPipeline.from_preset("tiny", device="cpu", dtype="float32", weights=folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    sums_file = folder / SHA256_FILE
    lines = sums_file.read_text(encoding="utf-8").splitlines() if sums_file.exists() else []
    for digest, name in (line.split(maxsplit=1) for line in lines if line.strip()):
        path = folder / name.lstrip("*")
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise CheckpointError(f"{path} is missing or differs from its checksum; {remedy}")
    files = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    return f"{len(files)} files, {size_mb:.1f} MB, all load" + ("; checksums match" if lines else "")


def check_sample() -> str:
    """Decode the bundled clip to its end.

    Raises:
        VideoReadError: it cannot be read, or frames are missing.
    """
    info, count = probe("sample"), sum(1 for _ in read_video("sample"))
    if count != info.num_frames:
        raise ValueError(f"{sample_clip_path()} gave {count} of {info.num_frames} frames; install streamdiff again")
    return f"{count} frames of {info.width}×{info.height} at {info.fps:g} fps"


def judge_preset(preset: Preset, facts: dict[str, Any]) -> str:
    """Whether a full-size preset could run here, how, and how fast; raises with what it needs when it could not."""
    need = memory_need(preset)
    largest = max(facts["gpus"], key=lambda gpu: gpu["memory_gb"], default=None)
    ways = ways_to_fit(preset, 1e9 * largest["memory_gb"]) if largest else []
    weights = f"weights come from {preset.source.repo} on first use"
    if largest and need.total_bytes <= 1e9 * largest["memory_gb"]:
        return f"the GPU is large enough for {need}; {predict_speed(preset, largest['name'])}; {weights}"
    if ways:
        return f"needs a GPU with {need}, runs here with {', or '.join(ways)}; {weights}"
    raise ValueError(f"needs a GPU with {need}, and its weights from {preset.source.repo}")


def predict_speed(preset: Preset, gpu_name: str) -> str:
    """Frames per second of a live stream by the roofline, or how to measure them."""
    measure = f"streamdiff bench --preset {preset.name} --random-weights"
    machine, work = machine_of(gpu_name), work_of(preset.name)
    if machine is None or work is None:
        return f"no prediction for {gpu_name}: {measure} measures it"
    found = {steps: forecast(work, "480p", machine.name, steps=steps) for steps in (1, 2)}
    figures = " and ".join(f"{f.fps:.0f} fps at {steps} step{'s' * (steps > 1)}" for steps, f in found.items())
    return f"predicted, not measured: {figures}, live at 480p ({measure} measures it)"


def measure_tiny(folder: Path, budget_s: float) -> str:
    """Frames per second of the bundled preset, by running it for a moment."""
    try:
        pipe, what = StreamPipeline.from_preset("tiny", weights=folder), ""
    except CheckpointError:
        pipe, what = random_pipeline("tiny"), " (with random weights: its own are not usable, see above)"
    preset = pipe.preset
    feed = FrameLoop(moving_frames(16, preset.width, preset.height))
    with pipe.start("oil painting") as session:
        session.push(feed.take(13))
        start_s, count = time.perf_counter(), 0
        while time.perf_counter() - start_s < budget_s or not count:
            count += len(session.push(feed.take(4)))
        fps = count / (time.perf_counter() - start_s)
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    pace = f"{fps / preset.fps:.1f}× real time"
    steps = f"{preset.schedule.default_steps} steps"
    where = f"{preset.width}×{preset.height}, {steps}, {dtype} on {pipe.device}"
    return f"runs: {fps:.0f} fps, {pace}, {where}{what}"


def to_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a terminal: one line a check."""
    width = max(len(check["name"]) for check in report["checks"])
    for check in report["checks"]:
        mark = "ok" if check["ok"] else "FAIL" if check["required"] else "no"
        yield f"{mark:>4}  {check['name']:<{width}}  {check['detail']}"
    yield ("Everything needed works." if report["ok"] else "Something needed is missing: see the lines marked FAIL.")
