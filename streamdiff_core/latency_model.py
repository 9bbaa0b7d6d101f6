"""How long a stage takes for so many rows: an affine law per stage, learned from measured ticks while serving.

    L(rows, latent_frames) = fixed_ms + unit_ms * rows * latent_frames

The fixed part is what a call costs whatever it holds (weights read, kernels launched), the unit part is one latent
frame of one row. This is the paper's L(T, B) = (A(T, B) + P) / (eta * bandwidth) with A proportional to B * T; its
throughput is f = B / L, which grows like B / (1 + B) up to the knee B*. A model starts from a prior (see
``roofline``) and follows the machine. Nothing here knows streams or deadlines (``planner``).
Source: SPEC §6.5, paper part; the released code has no such model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STAGES = ("encode", "denoise", "decode")
REFIT_SHARE = 16
"""A line is fitted anew once more than this part of its measurements is new: a fit takes as long as a small stage."""


@dataclass(frozen=True, slots=True)
class Line:
    """Affine cost of one call, in ms."""

    fixed_ms: float
    """Cost of a call, whatever it holds; >= 0."""
    unit_ms: float
    """Cost per row and latent frame; >= 0."""

    def __post_init__(self) -> None:
        if not (self.fixed_ms >= 0 and self.unit_ms >= 0 and self.fixed_ms + self.unit_ms > 0):
            raise ValueError(f"fixed_ms {self.fixed_ms} and unit_ms {self.unit_ms} must be >= 0 and not both 0")

    def ms(self, units: float) -> float:
        """Cost of a call over ``units`` = rows x latent frames."""
        return self.fixed_ms + self.unit_ms * units

    def throughput(self, units: float) -> float:
        """Units per second when every call holds ``units`` of them: f = B / L(B)."""
        return 1e3 * units / self.ms(units)

    def knee(self, efficiency: float = 0.5) -> float:
        """Units per call at which throughput reaches ``efficiency`` (in [0, 1)) of what any batch could reach.

        0.5 is the paper's B*, where the part that grows with the batch has caught up with the fixed part.
        Infinite where units cost nothing.
        """
        if not 0 <= efficiency < 1:
            raise ValueError(f"efficiency must lie in [0, 1), got {efficiency}")
        odds = efficiency / (1 - efficiency)
        return odds * self.fixed_ms / self.unit_ms if self.unit_ms else math.inf


class LatencyModel:
    """One ``Line`` per stage, refitted from the latest measurements.

    Args:
        priors: line of each stage before anything was measured. Only its shape matters once there is data: it is
            scaled to the machine by the first measurements.
        window: measurements remembered per stage; older ones are forgotten, so the model follows the machine.
        min_samples: measurements before the prior is left.
        lane: what the same calls take on one core while ``num_lanes - 1`` others work too; None: all cores always
            work together.
        num_lanes: cores that can each run a stream of its own.

    Raises:
        ValueError: not one prior per stage, or lanes without their costs.
    """

    def __init__(
        self,
        priors: Mapping[str, Line],
        *,
        window: int = 128,
        min_samples: int = 3,
        lane: LatencyModel | None = None,
        num_lanes: int = 1,
    ) -> None:
        if (lane is None) != (num_lanes == 1):
            raise ValueError(f"{num_lanes} lanes need {'no' if lane else 'a'} latency model of a lane")
        self.lane, self.num_lanes = lane, num_lanes
        if set(priors) != set(STAGES):
            raise ValueError(f"need one prior for each of {', '.join(STAGES)}, got {', '.join(sorted(priors))}")
        self._priors, self._min_samples = dict(priors), min_samples
        self._seen: dict[str, deque[tuple[float, float]]] = {stage: deque(maxlen=window) for stage in STAGES}
        self._fitted = dict(priors)
        self._num_new = dict.fromkeys(STAGES, 0)

    def observe(self, stage: str, rows: int, latent_frames: int, ms: float) -> None:
        """Notes one measured call: ``rows`` rows of ``latent_frames`` each took ``ms``.

        Raises:
            ValueError: unknown stage, or a size or time that is not positive and finite.
        """
        if stage not in self._seen:
            raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
        if rows < 1 or latent_frames < 1 or not (0 < ms < math.inf):
            raise ValueError(f"rows {rows}, latent_frames {latent_frames} and ms {ms} must be positive and finite")
        self._seen[stage].append((rows * latent_frames, ms))
        self._num_new[stage] += 1

    def line(self, stage: str) -> Line:
        """The law of a stage as of now."""
        num_seen = len(self._seen[stage])
        if num_seen >= self._min_samples and self._num_new[stage] > num_seen // REFIT_SHARE:
            units, ms = zip(*self._seen[stage], strict=True)
            self._fitted[stage] = fit_line(units, ms, self._priors[stage])
            self._num_new[stage] = 0
        return self._fitted[stage]

    def ms(self, stage: str, rows: int, latent_frames: int) -> float:
        """Predicted time of one call."""
        return self.line(stage).ms(rows * latent_frames)


def fit_line(
    units: Sequence[float], ms: Sequence[float], prior: Line, *, prior_weight: float = 2.0, rounds: int = 10
) -> Line:
    """The affine law through measurements that may hold outliers (a garbage collection, a busy neighbour).

    Reweighted least squares on relative residuals with Tukey's bisquare, which ignores what is far off. Two
    pseudo-measurements of the prior, scaled to the data, keep the slope known when all calls had one size; they
    are ignored like any outlier once the data contradict them.

    Args:
        units: rows x latent frames of each call.
        ms: time of each call.
        prior: shape to fall back on.
        prior_weight: weight of each of the two pseudo-measurements, in measurements.
        rounds: reweightings.
    """
    x, y = np.asarray(units, float), np.asarray(ms, float)
    scale = float(np.median(y / np.array([prior.ms(u) for u in x])))
    line = Line(scale * prior.fixed_ms, scale * prior.unit_ms)
    anchors = np.array([1.0, 2 * x.max() + 2])
    x, y = np.append(x, anchors), np.append(y, [line.ms(u) for u in anchors])
    trust = np.append(np.ones(len(units)), [prior_weight] * 2)
    for _ in range(rounds):
        fitted = line.fixed_ms + line.unit_ms * x
        residual = y / fitted - 1
        spread = max(1.4826 * float(np.median(np.abs(residual[:-2]))), 0.01)  # the pseudo ones do not vote
        bisquare = np.clip(1 - (residual / (4.685 * spread)) ** 2, 0, None) ** 2
        line = _least_squares(x, y, trust * bisquare / fitted**2) or line
    return line


def _least_squares(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Line | None:
    """Weighted line with both parts >= 0; None where nothing has weight."""
    if weight.sum() <= 0:
        return None
    mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
    variance = float(weight @ (x - mean_x) ** 2)
    slope = float(weight @ ((x - mean_x) * (y - mean_y))) / variance if variance > 0 else 0.0
    fixed = float(mean_y - slope * mean_x)
    if slope < 0:
        return Line(float(mean_y), 0.0)
    if fixed < 0:
        return Line(0.0, float(weight @ (x * y)) / float(weight @ (x * x)))
    return Line(fixed, slope)
