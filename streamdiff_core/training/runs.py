"""What every training stage shares: resumable checkpoints, metrics with a picture, the loop of the small networks.

A run is a folder with ``last.pt`` (model, optimiser, step, seconds spent; written to a temporary name, then
moved), ``metrics.csv`` and ``curve.png``. As a context manager it also saves when Ctrl-C stops it.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

LOG_EVERY_S = 180


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
        self.step, self._seconds_before, self._saved_step = 0, 0.0, -1
        last = folder / "last.pt"
        if last.exists():
            state = torch.load(last, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self._seconds_before = state["step"], state["seconds"]
            self._saved_step = self.step
        self._began = time.monotonic()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save what is new at the end and on Ctrl-C; a step that failed leaves the last checkpoint alone."""
        if (kind is None or issubclass(kind, KeyboardInterrupt)) and self.step != self._saved_step:
            self.save()

    @property
    def seconds(self) -> float:
        """Wall time spent in this run, all sessions together."""
        return self._seconds_before + time.monotonic() - self._began

    def save(self) -> None:
        """Write ``last.pt``."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        atomic_save({**state, "step": self.step, "seconds": self.seconds}, self.folder / "last.pt")
        self._saved_step = self.step

    def log(self, values: Mapping[str, float]) -> None:
        """Append one row to ``metrics.csv`` and redraw ``curve.png``."""
        path = self.folder / "metrics.csv"
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {name: round(value, 5) for name, value in values.items()}
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


def learning_rate(peak: float, step: int, progress: float, warmup_steps: int) -> float:
    """Linear warm-up over steps, then half a cosine over ``progress`` in [0, 1] down to 2 % of ``peak``."""
    return peak * min(1, (step + 1) / warmup_steps) * (0.02 + 0.98 * math.cos(progress * math.pi / 2) ** 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same learning rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


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


@dataclass(frozen=True)
class Trainee:
    """A network and those of its parameters that are trained."""

    model: nn.Module
    name: str
    """What its entry in a checkpoint is called."""
    parameters: Sequence[nn.Parameter]


def fit(
    trainee: Trainee,
    folder: Path,
    loss_of: Callable[[int, torch.Generator], Tensor],
    score: Callable[[dict[str, Tensor]], Mapping[str, float]],
    *,
    minutes: float,
    peak_lr: float,
    seed: int = 0,
) -> None:
    """Train on ``loss_of(step, generator)`` into ``folder`` for ``minutes`` in all; resumes.

    Every three minutes and at the end the averaged weights are scored, logged and saved.
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(trainee.parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    average = Average(trainee.model, decay=0.998)
    run = Run(folder, **{trainee.name: trainee.model}, average=average, optimizer=optimizer)
    budget_s, last_log_s = 60 * minutes, run.seconds
    bar = tqdm(total=round(budget_s), initial=round(run.seconds), unit="s", desc=folder.name)
    with run, bar:
        while run.seconds < budget_s:
            set_learning_rate(optimizer, learning_rate(peak_lr, run.step, run.seconds / budget_s, 50))
            loss = loss_of(run.step, torch.Generator().manual_seed(seed * 1_000_003 + run.step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters, 1.0)
            optimizer.step()
            average.update(trainee.model)
            run.step += 1
            if run.seconds - last_log_s > LOG_EVERY_S or run.seconds >= budget_s:
                run.log({"loss": loss.item(), **score(average.shadow)})
                run.save()
                last_log_s = run.seconds
            bar.set_postfix(step=run.step, loss=f"{loss.item():.4f}", refresh=False)
            bar.update(round(run.seconds) - bar.n)
