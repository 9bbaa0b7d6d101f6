"""Bidirectional warm-up: a long first chunk whose frames all see each other, kept as the sink of the whole stream.

Live2Diff (SEEDS §5). A chunk is bidirectional inside anyway and the first latent frames fill the sinks, so all it takes
is a longer first chunk; give the cache as many sink frames.
"""

from __future__ import annotations

from streamdiff_core.inputs._rule import InputRule, input_rule


@input_rule("warmup")
class Warmup(InputRule):
    """The first chunk is long, and its frames all see each other.

    Paper: Live2Diff, warm-up frames (SEEDS §5).
    Training-free: yes as a rule; the paper's own model is a fine-tuned SD1.5 with depth.
    Cost: the first picture waits for 4 (latent_frames - 1) + 1 input frames; then as a sink of that many frames.
    Look for: a steadier start and a style that stays, with ``sink_frames`` as large as the warm-up.
    Deviates: no depth input; once per stream, not again after a ``reset``.
    """

    latent_frames: int
    """Latent frames of the first chunk; must fit sinks + window."""

    def __init__(self, *, latent_frames: int = 8) -> None:
        if latent_frames < 1:
            raise ValueError(f"warmup needs latent_frames >= 1, got {latent_frames}")
        self.latent_frames = self.first_chunk_latent_frames = latent_frames
