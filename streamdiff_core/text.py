"""The bundled text encoder: hashed character n-grams per word, one small transformer, zero-padded tokens.

It takes the place of umT5 in the ``tiny`` preset and keeps umT5's contract (SPEC §1.9): [B, text_len, text_dim],
rows beyond the prompt's length are zero. Sub-word hashing gives unseen spellings and inflections a sensible
vector; there is no vocabulary file.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.config import TextConfig


def word_ngrams(word: str, num_buckets: int) -> list[int]:
    """Bucket ids of a word and of its character 3- and 4-grams, with word boundaries marked."""
    marked = f"<{word}>"
    grams = [marked] + [marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)]
    return [zlib.crc32(g.encode()) % num_buckets for g in grams]


class TinyTextEncoder(nn.Module):
    """Free text -> prompt tokens. ``TextEncoder`` protocol."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.EmbeddingBag(config.num_buckets, config.dim, mode="mean")
        self.position = nn.Parameter(torch.zeros(config.text_len, config.dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.dim, config.num_heads, 4 * config.dim, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def tokenize(self, prompt: str) -> list[list[int]]:
        """n-gram ids per word, at most ``text_len`` words; an empty prompt is one empty word."""
        words = re.findall(r"\w+", prompt.lower())[: self.config.text_len] or [""]
        return [word_ngrams(word, self.config.num_buckets) for word in words]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, text_len, dim], zero beyond each prompt's length."""
        tokens = [self.tokenize(p) for p in prompts]
        device = self.position.device
        flat = [ids for prompt in tokens for ids in prompt]
        offsets = torch.tensor([0, *map(len, flat)][:-1]).cumsum(0)
        vectors = self.table(torch.tensor([i for ids in flat for i in ids], device=device), offsets.to(device))
        lengths = [len(p) for p in tokens]
        x = nn.utils.rnn.pad_sequence(vectors.split(lengths), batch_first=True)
        padding = torch.arange(x.shape[1], device=device) >= torch.tensor(lengths, device=device)[:, None]
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        x = self.norm(x).masked_fill(padding[..., None], 0.0)
        return F.pad(x, (0, 0, 0, self.config.text_len - x.shape[1]))
