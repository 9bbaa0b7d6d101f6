"""What every training stage shares: resumable checkpoints, a metrics file and a loss-curve picture.

A run is a folder with ``last.pt`` (model, optimiser, step, seconds spent; written to a temporary name, then moved),
``metrics.csv`` and ``curve.png``.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def atomic_save(value: Any, path: Path) -> None:
    """``torch.save`` that never leaves a half-written file."""
    partial = path.with_suffix(".tmp")
    torch.save(value, partial)
    os.replace(partial, path)


class Run:
    """One training run in a folder; ``seconds`` and ``step`` survive a restart."""

    def __init__(self, folder: Path, **parts: Any) -> None:
        """Resume from ``last.pt`` when there is one. ``parts`` have ``state_dict`` / ``load_state_dict``."""
        self.folder, self.parts = folder, parts
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self._seconds_before = 0, 0.0
        last = folder / "last.pt"
        if last.exists():
            state = torch.load(last, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self._seconds_before = state["step"], state["seconds"]
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time spent in this run, all sessions together."""
        return self._seconds_before + time.monotonic() - self._began

    def save(self) -> None:
        """Write ``last.pt``."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        atomic_save({**state, "step": self.step, "seconds": self.seconds}, self.folder / "last.pt")

    def log(self, values: Mapping[str, float]) -> None:
        """Append one row to ``metrics.csv`` and redraw ``curve.png``."""
        path = self.folder / "metrics.csv"
        row = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 5) for k, v in values.items()}}
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        draw_curves(path, self.folder / "curve.png")


def draw_curves(metrics: Path, picture: Path) -> None:
    """Plot every column of a metrics file against minutes; does nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    columns = [c for c in rows[0] if c not in ("step", "seconds")]
    figure = Figure(figsize=(4 * len(columns), 3), layout="constrained")
    minutes = [float(r["seconds"]) / 60 for r in rows]
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axis.plot(minutes, [float(r[column]) for r in rows])
        axis.set(title=column, xlabel="minutes")
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


class Average(nn.Module):
    """Exponential moving average of a model's weights, with the usual warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone().float() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value.detach().float(), 1 - decay)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Averaged weights and the update count."""
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Inverse of ``state_dict``."""
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]
