"""The yardstick of "DiT chunk vs float32 eager": same model, same shapes, without this library's savings.

``EagerTransformer`` is the plain way to write it: float32, q, k and v as three products, the prompt's keys
and values computed again in every forward, and the temporal rotation of every visible key applied again in
every layer of every forward. It shares the batching of rows, SDPA, the cache policy and the modules of the real
model (in float32 those call PyTorch's own functions only), so the ratio counts only number type, fused products and
what is computed once instead of again; nothing in it is slower than it has to be.
``compare_with_eager`` runs both in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff_core.config import CacheConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.engine import Engine
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.rope import rotate, temporal_rotation
from streamdiff_core.timing import percentile
from streamdiff_core.types import KVPolicy, Read, RowOp, RowPlan


class EagerView:
    """One row's cache as a first version would be written: all keys are rotated in time at every read."""

    def __init__(self, model: CausalWanTransformer, policy: KVPolicy, tokens_per_frame: int) -> None:
        config = model.config
        shape = (config.num_layers, policy.num_slots, tokens_per_frame, config.num_heads, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        self.policy, self.table, self.columns = policy, policy.new_table(), config.rope_columns
        self.plan: RowPlan

    def begin(self, frame_ids: Sequence[int]) -> None:
        """Decide what the next forward writes and sees."""
        self.plan = self.policy.plan(self.table, frame_ids)

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Read]:
        """Same contract as ``CacheView.read``, for plans without edits."""
        tokens = self.k.shape[2]
        for slot, j in self.plan.writes:
            self.k[layer, slot] = k[j * tokens : (j + 1) * tokens]
            self.v[layer, slot] = v[j * tokens : (j + 1) * tokens]
        seen = self.plan.num_visible
        turn = temporal_rotation(self.plan.slot_positions, self.columns, k.dtype, k.device)  # [N, columns]
        keys = rotate(self.k[layer, :seen], turn[:, None])
        return [Read(keys.flatten(0, 1), self.v[layer, :seen].flatten(0, 1))]

    def query_rotation(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Same contract as ``CacheView.query_rotation``."""
        return temporal_rotation(self.plan.query_positions, self.columns, dtype, device)


class EagerTransformer:
    """Unfused float32 copy of a transformer with one ``EagerView`` per row."""

    def __init__(
        self,
        model: CausalWanTransformer,
        cache: CacheConfig,
        policy: str,
        num_rows: int,
        tokens_per_frame: int,
    ) -> None:
        self.model = CausalWanTransformer(model.config).to(model.device)
        self.model.load_state_dict(model.state_dict())
        self.model.eval().requires_grad_(False)
        self.views = [EagerView(self.model, POLICIES[policy](cache), tokens_per_frame) for _ in range(num_rows)]

    @torch.inference_mode()
    def forward(self, xt: Tensor, timestep: Tensor, tokens: Tensor, frame_ids: Sequence[Sequence[int]]) -> Tensor:
        """Velocity [B, F, C, h, w] of one chunk per row; ``tokens`` [1, text_len, text_dim] is the prompt."""
        for view, frames in zip(self.views, frame_ids, strict=True):
            view.begin(frames)
        return self.model(xt, timestep, self.model.encode_prompt(tokens), self.views)


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerComparison:
    """Milliseconds of one forward of all rows, cache full."""

    ours_ms: float
    """Median of the real model."""
    eager_ms: float
    """Median of the yardstick."""
    speedup: float
    """Median of the ratios of neighbouring runs, which cancels slow drift of the machine."""
    num_pairs: int
    """Pairs measured."""


def compare_with_eager(
    model: CausalWanTransformer,
    cache: CacheConfig,
    tokens: Tensor,
    *,
    latent_size: tuple[int, int],
    policy: str = "sink",
    num_rows: int = 2,
    num_pairs: int = 12,
) -> EagerComparison:
    """One latent frame per row against a full cache, both ways in turn, in this process.

    Args:
        model: the transformer as it streams (its number type, fused).
        tokens: prompt tokens [1, text_len, text_dim].
        latent_size: (h, w).
        num_rows: rows of a forward; the denoising steps of a stream batch.
    """
    engine, prompt = Engine(model), model.encode_prompt(tokens)
    per_frame = model.config.tokens_per_frame(*latent_size)
    kv = KVCache(
        model.config, POLICIES[policy](cache), num_rows=num_rows,
        tokens_per_frame=per_frame, dtype=model.dtype, device=model.device,
    )  # fmt: skip
    eager = EagerTransformer(model, cache, policy, num_rows, per_frame)
    xt = torch.randn(num_rows, 1, model.config.in_channels, *latent_size, device=model.device)
    timesteps = [500.0 / (row + 1) for row in range(num_rows)]
    told = torch.tensor(timesteps, device=model.device)[:, None]

    def ours(frame: int) -> None:
        rows = [
            RowOp(
                xt=xt[r], sigma=timesteps[r] / 1000, timestep=timesteps[r], frame_ids=(frame,),
                cache_row=r, chunk_idx=frame, step=r, prompt=prompt,
            )
            for r in range(num_rows)
        ]  # fmt: skip
        engine.forward([(kv, row) for row in rows])

    warmup = cache.cache_frames + 2
    times = []
    for frame in range(warmup + num_pairs):
        runs = (
            lambda f=frame: ours(f),
            lambda f=frame: eager.forward(xt, told, tokens, [(f,)] * num_rows),
        )
        order = (0, 1) if frame % 2 else (1, 0)
        pair = {which: time_ms(runs[which], model.device) for which in order}
        times.append((pair[0], pair[1]))
    times = times[warmup:]
    return EagerComparison(
        ours_ms=percentile([a for a, _ in times], 50),
        eager_ms=percentile([b for _, b in times], 50),
        speedup=percentile([b / a for a, b in times], 50),
        num_pairs=num_pairs,
    )


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device's queue emptied before and after."""
    synchronize(device)
    start_s = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start_s)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
