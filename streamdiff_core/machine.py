"""What this computer is, in plain values: for ``streamdiff doctor`` and the head of every benchmark.

Nothing here measures speed (``timing``, ``bench``) or judges (``doctor``).
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from streamdiff_core import __version__, native_kernels
from streamdiff_core.pipeline import cpu_has_bf16


def machine_facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, processor, memory and graphics cards; ``hardware`` is what the work runs on, in words."""
    place = torch.device(device)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cores = usable_cores()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyav": package_version("av"),
        "streamdiff": __version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": cores,
        "cpu_has_bf16": cpu_has_bf16(),
        "cpu_kernels": native_kernels.is_ready(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_free_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
    }
    on_gpu = place.type == "cuda" and gpus
    facts["hardware"] = (
        gpus[place.index or 0].name if on_gpu else f"{facts['cpu']}, {cores} core{'s' if cores > 1 else ''}"
    )
    return facts


def usable_cores() -> int:
    """Cores this process may use (containers often get fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Name of the processor as its maker writes it, or its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    except OSError:
        names = []
    if not names and sys.platform == "darwin":
        names = [_output_of(["sysctl", "-n", "machdep.cpu.brand_string"])]
    return next((" ".join(n.split()) for n in names if n.strip()), platform.processor() or platform.machine())


def package_version(name: str) -> str | None:
    """Version of an installed package, None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """``git describe`` of the checkout this package was imported from; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    return _output_of(["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]) or None


def peak_memory_bytes() -> int:
    """Most resident memory this process ever had."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
