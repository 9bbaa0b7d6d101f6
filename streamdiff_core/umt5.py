"""umT5-XXL, the text encoder of the Wan models: loaded only for a prompt never seen before, freed right after.

It is the largest thing in the installation (11 GB in bfloat16) and needed once per prompt; upstream keeps it on every
GPU. Here embeddings are kept on disk, one small file per prompt, and the encoder comes through transformers, on the CPU
unless told otherwise. One more file, made by ``export``, may come with the package: prompts in it never need the
encoder. Cleaning and padding are Wan's (SPEC §1.9): ftfy, double HTML unescape, white space collapsed, 512 tokens, zero
beyond the prompt's length.
"""

from __future__ import annotations

import gc
import hashlib
import html
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

Load = Callable[[], tuple[Any, Any]]
"""Gives (tokenizer, encoder), both as transformers makes them."""


class UMT5Encoder:
    """``TextEncoder`` that keeps embeddings on disk instead of the encoder in memory."""

    def __init__(
        self,
        load: Load,
        folder: Path,
        *,
        name: str,
        text_len: int = 512,
        device: torch.device | str = "cpu",
        shipped: Path | None = None,
    ) -> None:
        """
        Args:
            load: called when a prompt is not on disk.
            folder: where embeddings are kept.
            name: of the encoder's weights; embeddings of different weights never mix.
            text_len: tokens after padding.
            device: where embeddings are wanted.
            shipped: file of ``export``, asked first; need not be there.
        """
        self.load, self.folder, self.name, self.text_len, self.device = load, folder, name, text_len, device
        self.shipped = shipped

    def to(self, device: torch.device | str) -> UMT5Encoder:
        """Hand out embeddings there; the encoder itself stays where ``load`` puts it."""
        self.device = device
        return self

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, text_len, text_dim], float32, zero beyond each prompt's length."""
        found = self.embed(prompts)
        rows = [found[clean_prompt(p)].float() for p in prompts]
        return torch.stack([F.pad(x, (0, 0, 0, self.text_len - len(x))) for x in rows]).to(self.device)

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Cleaned prompts -> tokens [length, text_dim] bfloat16: read, or computed and kept."""
        cleaned = [clean_prompt(p) for p in prompts]
        known = {p: self._read(p) for p in cleaned}
        missing = [p for p, rows in known.items() if rows is None]
        return known | (self._compute(missing) if missing else {})

    def export(self, prompts: Sequence[str], path: Path) -> None:
        """Write all these prompts into one file that another installation can have as its ``shipped``."""
        found = self.embed(prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {f"prompt {i}": prompt for i, prompt in enumerate(found)}
        _save({self._key(p): rows for p, rows in found.items()}, path, names | {"encoder": self.name})

    def file_of(self, cleaned: str) -> Path:
        """Where the embedding of a cleaned prompt is kept."""
        return self.folder / f"{self._key(cleaned)}.safetensors"

    def _key(self, cleaned: str) -> str:
        return hashlib.sha256(f"{self.name}\n{self.text_len}\n{cleaned}".encode()).hexdigest()[:32]

    def _read(self, cleaned: str) -> Tensor | None:
        places = [(self.shipped, self._key(cleaned))] if self.shipped else []
        for path, key in (*places, (self.file_of(cleaned), "tokens")):
            try:
                with safe_open(path, "pt") as file:
                    return file.get_tensor(key)
            except (FileNotFoundError, SafetensorError):  # absent or damaged: look further, then compute it again
                continue
        return None

    @torch.inference_mode()
    def _compute(self, cleaned: list[str]) -> dict[str, Tensor]:
        """Load the encoder, embed, write to disk, let the encoder go."""
        start_s = time.perf_counter()
        tokenizer, encoder = self.load()
        found = {}
        for prompt in cleaned:
            tokens = tokenizer(
                [prompt], padding="max_length", truncation=True, max_length=self.text_len,
                add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
            )  # fmt: skip
            mask = tokens["attention_mask"]
            place = next(encoder.parameters()).device
            hidden = encoder(tokens["input_ids"].to(place), mask.to(place)).last_hidden_state[0]
            found[prompt] = hidden[: int(mask.sum())].to("cpu", torch.bfloat16).contiguous()
            self._write(prompt, found[prompt])
        del tokenizer, encoder
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.info("umT5 loaded, used for %d prompts, freed: %.1f s", len(found), time.perf_counter() - start_s)
        return found

    def _write(self, prompt: str, rows: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _save({"tokens": rows}, self.file_of(prompt), {"prompt": prompt, "encoder": self.name})


def _save(tensors: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """A whole file or none."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, partial, facts)
    os.replace(partial, path)


def clean_prompt(text: str) -> str:
    """Wan's cleaning of a prompt: mojibake repaired, HTML unescaped twice, white space collapsed (SPEC §1.9)."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
