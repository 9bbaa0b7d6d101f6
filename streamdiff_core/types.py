"""Values and Protocols shared by all layers: row operations, cache plans, schedule events, errors.

A ``row`` is one line of a batched forward: one chunk of one stream at one noise level. Nothing here computes.
Shape letters: T pixel frames, F latent frames, C latent channels, h x w latent size, n heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


GREY_LEVELS_PER_UNIT = 127.5
"""Grey levels per unit of a picture in [-1, 1]."""


class StreamClosedError(RuntimeError):
    """A closed session was used."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be read or does not fit the model; nothing was loaded."""


class StageLostError(RuntimeError):
    """A rank of a pipeline over several processes died, hangs or failed; the text names it."""


class VideoReadError(RuntimeError):
    """A video could not be read."""


@dataclass(slots=True)
class Read:
    """Keys and values that one group of heads attends to."""

    keys: Tensor
    """[N, n, d], fully rotated."""
    values: Tensor
    """[N, n, d]."""
    bias: Tensor | None = None
    """Added to the attention logits, broadcastable to [n, L, N]."""
    heads: Sequence[int] | None = None
    """Heads these keys belong to; None: all."""


Edit = Any
"""``(slots: LayerSlots, q, k, v) -> None``: work on one layer's slots before the chunk is written; q, k, v are the
chunk's [F, P, n, d], q fully rotated, k without time."""
Reader = Any
"""``(slots: LayerSlots, q) -> list[Read]``: what this layer's heads attend to, after the chunk is written."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What one row of one forward reads and writes, decided on the host before the first layer runs.

    The plain case is the first four fields: no copy is made and nothing else runs.
    """

    writes: tuple[tuple[int, int], ...]
    """(slot, offset of the latent frame within the chunk) pairs to write."""
    num_visible: int
    """How many slots are attended to: slots 0 … num_visible - 1 unless ``visible`` names them."""
    slot_positions: tuple[int | None, ...]
    """Temporal position of each visible slot; None leaves its tokens as they are turned."""
    query_positions: tuple[int, ...]
    """Temporal position of each latent frame of the chunk."""
    visible: tuple[int, ...] | None = None
    """The slots attended to, where they are not simply the first ones."""
    bias: tuple[float, ...] | None = None
    """Added to the attention logits, per visible slot."""
    edits: tuple[Edit, ...] = ()
    """What happens to slots before the chunk is written: copies, blends, selections of tokens."""
    reader: Reader | None = None
    """Replaces the plain read of the visible slots."""

    def adding(self, edit: Edit) -> RowPlan:
        """The same plan with one more edit."""
        return replace(self, edits=(*self.edits, edit))


TOKENS = -1
"""Entry of ``SlotTable.frames`` for a slot that holds tokens of several latent frames."""


@dataclass(slots=True)
class SlotTable:
    """Which latent frame each slot of one cache row holds; plain integers."""

    frames: list[int | None]
    """Latent frame per slot, None while empty, ``TOKENS`` for a mixture."""
    roles: list[str]
    """Why a slot is kept: ``sink``, ``memory``, ``window`` … ; the one it was made for while empty."""
    descriptors: dict[int, Any] = field(default_factory=dict)
    """Unit-length content descriptor per slot, for adaptive sinks."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else a policy remembers about the row; values are replaced, never changed in place."""

    @property
    def is_sink(self) -> list[bool]:
        """Whether each slot is pinned."""
        return [role == "sink" for role in self.roles]

    @property
    def num_filled(self) -> int:
        """Slots in use."""
        return sum(f is not None for f in self.frames)

    @property
    def newest(self) -> int:
        """Newest latent frame held, -1 without any."""
        return max((f for f in self.frames if f is not None), default=-1)

    @property
    def is_empty(self) -> bool:
        """Whether no latent frame is held."""
        return self.newest < 0

    def slots_of(self, frame_idx: int) -> list[int]:
        """Slots that hold a latent frame (more than one after a paper-form sink refresh)."""
        return [slot for slot, f in enumerate(self.frames) if f == frame_idx]

    def with_role(self, role: str) -> list[int]:
        """Filled slots of one role, oldest frame first."""
        slots = [s for s, f in enumerate(self.frames) if f is not None and self.roles[s] == role]
        return sorted(slots, key=lambda s: self.frames[s])

    def empty(self, slot: int) -> None:
        """Forget what a slot holds."""
        self.frames[slot] = None
        self.descriptors.pop(slot, None)

    def copy(self) -> SlotTable:
        """An independent table with the same content."""
        return SlotTable(list(self.frames), list(self.roles), dict(self.descriptors), dict(self.notes))


@runtime_checkable
class KVPolicy(Protocol):
    """Decides what a row of the cache keeps and at which temporal position it is read."""

    switches: tuple[str, ...]
    """Prompt switches the policy can carry out."""

    @property
    def num_slots(self) -> int:
        """Slots a row needs."""

    def new_table(self) -> SlotTable:
        """An empty row."""

    def plan(self, table: SlotTable, frame_ids: Sequence[int], descriptor: Any = None) -> RowPlan:
        """Place a chunk (evicting only when its frames are new), update ``table`` and say what is visible."""

    def before_chunk(self, table: SlotTable, switch: str | None) -> list[tuple[int, ...]]:
        """A new chunk is about to enter, perhaps with a prompt switch: groups of held frames to compute again."""

    def check(self, latent_frames_per_chunk: int) -> None:
        """Refuse (``ValueError``, one sentence) a chunk length that the policy cannot hold."""


@dataclass(slots=True)
class RowOp:
    """One row of a forward: a chunk of a stream at one noise level."""

    xt: Tensor
    """Noisy latents [F, C, h, w]."""
    sigma: float | tuple[float, ...]
    """Noise level of ``xt`` in [0, 1]; one value, or one per latent frame."""
    timestep: float | tuple[float, ...]
    """What the model is told, in [0, 1000]; one value, or one per latent frame."""
    frame_ids: tuple[int, ...]
    """Latent frame index of each frame of the chunk."""
    cache_row: int
    """Row of the stream's cache that is read and written."""
    chunk_idx: int
    """Chunk number in the stream."""
    step: int
    """Denoising step, 0 first."""
    prompt: Any
    """Cross-attention keys and values (``PromptContext``)."""
    descriptor: Any = None
    """Content descriptor of the chunk for adaptive sinks."""
    kind: str = "denoise"
    """``denoise``, ``clean`` (rewrites the cache with clean latents) or ``recache`` (same, new prompt)."""


@dataclass(slots=True)
class ForwardOp:
    """Rows that a schedule wants computed together; the x0 predictions come back in the same order."""

    rows: list[RowOp]


@dataclass(slots=True)
class Fork:
    """Copy cache row ``src`` to rows ``dst``."""

    src: int
    dst: tuple[int, ...]


@dataclass(slots=True)
class Emit:
    """A finished chunk leaves the schedule."""

    chunk_idx: int
    latents: Tensor
    """x0 [F, C, h, w]."""


@dataclass(slots=True)
class Chunk:
    """A chunk of the stream on its way into the schedule."""

    chunk_idx: int
    frame_ids: tuple[int, ...]
    """Latent frame indices."""
    latents: Tensor
    """Clean latents of the input [F, C, h, w]; zeros for text-to-video."""
    noise_scale: float
    """Noise put on the input, [0, 1]."""
    timesteps: tuple[float, ...]
    """Timestep per denoising step, strictly decreasing."""
    prompt: Any
    """Cross-attention keys and values the chunk keeps for all its steps."""
    num_frames: int = 0
    """Pixel frames that are not padding."""
    motion: float = 0.0
    """Motion score of the chunk."""
    descriptor: Any = None
    """Content descriptor of the chunk for adaptive sinks."""
    options: Any = None
    """``StreamOptions`` the chunk was made under; they hold from this chunk on. None: those before it."""


@dataclass(frozen=True, slots=True)
class ScheduleCost:
    """What a schedule costs once it runs evenly."""

    latency_chunks: int
    """Chunks that enter after a chunk before it leaves."""
    forwards_per_chunk: tuple[int, int]
    """Least and most forwards per chunk; they differ where the content decides."""
    rows_per_forward: int = 1
    """Rows of the largest forward."""
    chunks_per_row: int = 1
    """Chunks denoised as one sequence in the longest row."""


@runtime_checkable
class DenoiseSchedule(Protocol):
    """Which forwards, at which noise level, in which order, and when chunks leave."""

    num_cache_rows: int
    """Cache rows a stream needs; the last one holds the past of the chunks that leave."""
    cost: ScheduleCost
    """What it costs."""

    def push(self, chunk: Chunk | None) -> Generator[ForwardOp | Fork | Emit, list[Tensor] | None, None]:
        """Process one chunk; ``None`` flushes one tick. ``x0s = yield ForwardOp(...)``; ``yield Emit(...)``."""

    @property
    def num_in_flight(self) -> int:
        """Chunks entered and not yet emitted."""


@runtime_checkable
class StreamingVAE(Protocol):
    """Pixels <-> latents with explicit per-stream memory (our tiny VAE; Wan's and TAEHV fit the same shape)."""

    def new_state(self) -> Any:
        """Memory of one stream."""

    def encode(self, frames: Tensor, state: Any) -> Tensor:
        """[B, T, 3, H, W] in [-1, 1] -> [B, F, C, h, w]; 1 + 4n frames first, 4n later."""

    def decode(self, latents: Tensor, state: Any) -> Tensor:
        """[B, F, C, h, w] -> [B, T, 3, H, W] in [-1, 1]."""


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to prompt tokens (our tiny encoder; umT5 fits the same shape)."""

    def encode(self, prompts: Iterable[str]) -> Tensor:
        """-> [B, text_len, text_dim], zero beyond each prompt's length."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Result of ``encode_chunk``: a chunk ready for the schedule, and what the noise controller saw."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class DenoisedChunk:
    """Result of ``denoise_chunk``: clean latents [F, C, h, w] of one chunk."""

    chunk_idx: int
    latents: Tensor
    num_frames: int


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """Result of ``decode_chunk``: uint8 frames [T, H, W, 3]."""

    chunk_idx: int
    frames: np.ndarray
