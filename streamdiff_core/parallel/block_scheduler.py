"""Which rank runs which layers: the exact split that makes the slowest stage as fast as it can be, and when to move.

Pure functions on measured milliseconds; ranks may differ in speed, encode weighs on the first and decode on the last
(paper §4, SPEC §6.4). The released code nudges layer counts in proportion to each rank's distance from the mean, once
per run and with one time per layer for all ranks: ``released_split`` reproduces that rule for comparison, and a test
names inputs where it is slower. Here the split is the optimum of a dynamic programme, asked again and again, and only
taken when the gain is worth a pause (``decide``). Moving the layers is ``stage.py``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

Split = tuple[int, ...]
"""Layers per rank, in order; rank r runs layers sum(split[:r]) … sum(split[: r + 1]) - 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTimes:
    """What one micro-step costs on one rank."""

    layer_ms: float
    """One average layer."""
    fixed_ms: float = 0.0
    """What does not move with the layers: encode and embedding (first rank), head and decode (last), messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceRule:
    """When a better split is worth the pause of moving layers."""

    min_gain: float = 0.05
    """Least relative gain of the slowest stage; below it measured times are noise (hysteresis)."""
    layer_move_ms: float = 0.0
    """Pause per moved layer."""
    payback_steps: int = 200
    """Micro-steps within which the gain has to pay for the pause."""
    min_layers: int = 0
    """Layers every rank keeps; 0 lets encode or decode have a rank of its own."""


def even_split(num_layers: int, num_ranks: int) -> Split:
    """Equal shares, the remainder to the first ranks; where a run starts before anything was measured."""
    share, rest = divmod(num_layers, num_ranks)
    return tuple(share + (rank < rest) for rank in range(num_ranks))


def layer_ranges(split: Split) -> list[range]:
    """Layers of each rank."""
    return [range(start, stop) for start, stop in pairwise((0, *accumulate(split)))]


def stage_ms(split: Split, times: Sequence[RankTimes], layer_cost: Sequence[float] | None = None) -> list[float]:
    """Predicted time of each stage under a split."""
    cost = [1.0] * sum(split) if layer_cost is None else layer_cost
    return [t.fixed_ms + t.layer_ms * sum(cost[i] for i in r) for t, r in zip(times, layer_ranges(split), strict=True)]


def optimal_split(
    times: Sequence[RankTimes],
    num_layers: int,
    *,
    current: Split | None = None,
    layer_cost: Sequence[float] | None = None,
    min_layers: int = 0,
    max_layers: Sequence[int] | None = None,
) -> Split:
    """Contiguous split whose slowest stage is fastest; among those, the one that moves the fewest layers.

    Args:
        times: measured, one per rank.
        num_layers: layers to place.
        current: where the layers are now; breaks ties (without it: towards equal shares).
        layer_cost: relative cost per layer, default all 1.
        min_layers: fewest layers per rank.
        max_layers: most layers per rank, where its memory ends.

    Raises:
        ValueError: the limits leave no split.

    Two dynamic programmes over (ranks, layers placed): the best bound, then the fewest moves within it.
    """
    num_ranks = len(times)
    most = [num_layers] * num_ranks if max_layers is None else list(max_layers)
    if num_ranks * min_layers > num_layers or sum(most) < num_layers or any(m < min_layers for m in most):
        raise ValueError(f"{num_layers} layers do not fit {num_ranks} ranks of {min_layers} to {most} layers each")
    before = list(accumulate([1.0] * num_layers if layer_cost is None else layer_cost, initial=0.0))
    home = layer_ranges(current or even_split(num_layers, num_ranks))

    def stage(rank: int, start: int, stop: int) -> float:
        return times[rank].fixed_ms + times[rank].layer_ms * (before[stop] - before[start])

    def search(bound: float) -> tuple[float, float, Split]:
        """(slowest stage, layers moved, split) of the best split with no stage above ``bound``."""
        best: dict[int, tuple[float, float, Split]] = {0: (0.0, 0.0, ())}
        for rank in range(num_ranks):
            grown: dict[int, tuple[float, float, Split]] = {}
            for start, (slowest, moved, split) in best.items():
                for stop in range(start + min_layers, min(start + most[rank], num_layers) + 1):
                    if (ms := stage(rank, start, stop)) > bound:
                        continue
                    strangers = sum(layer not in home[rank] for layer in range(start, stop))
                    entry = (max(slowest, ms), moved + strangers, (*split, stop - start))
                    key = entry[:2] if bound == inf else (entry[1], entry[0])
                    old = grown.get(stop)
                    if old is None or key < (old[:2] if bound == inf else (old[1], old[0])):
                        grown[stop] = entry
            best = grown
        return best[num_layers]

    return search(search(inf)[0] * (1 + 1e-12))[2]


def released_split(split: Split, dit_ms: Sequence[float], total_ms: Sequence[float]) -> Split:
    """The released proportional rule, for comparison (SPEC §6.4).

    Args:
        split: layers per rank while measured.
        dit_ms: time of each rank's layers.
        total_ms: the same with encode and decode.
    """
    num_ranks, num_layers = len(split), sum(split)
    per_layer, mean = sum(dit_ms) / num_layers, sum(total_ms) / num_ranks
    target = [max(1, round(n + (mean - t) / per_layer)) for n, t in zip(split, total_ms, strict=True)]
    while (missing := num_layers - sum(target)) != 0:
        order = sorted(range(num_ranks), key=lambda rank: target[rank], reverse=missing < 0)
        for rank in order[: abs(missing)]:
            target[rank] = target[rank] + 1 if missing > 0 else max(1, target[rank] - 1)
    return tuple(target)


def moves(old: Split, new: Split) -> list[tuple[int, int, int]]:
    """(layer, from rank, to rank) of every layer that changes hands, in layer order."""
    homes = [[rank for rank, n in enumerate(split) for _ in range(n)] for split in (old, new)]
    return [(layer, a, b) for layer, (a, b) in enumerate(zip(*homes, strict=True)) if a != b]


def decide(times: Sequence[RankTimes], current: Split, rule: BalanceRule | None = None) -> Split | None:
    """A better split if it is worth moving now, else None. Ask as often as there are new measurements."""
    rule = rule or BalanceRule()
    new = optimal_split(times, sum(current), current=current, min_layers=rule.min_layers)
    now_ms, then_ms = max(stage_ms(current, times)), max(stage_ms(new, times))
    pause_ms = rule.layer_move_ms * len(moves(current, new))
    worth_it = now_ms - then_ms > rule.min_gain * now_ms and (now_ms - then_ms) * rule.payback_steps > pause_ms
    return new if worth_it else None
