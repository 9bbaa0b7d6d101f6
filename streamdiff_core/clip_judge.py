"""CLIP as a judge of pictures against a prompt, where its weights are on this machine; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch


def load_judge(folder: str | Path) -> Callable[[np.ndarray, str], float]:
    """A function (uint8 [H, W, 3], prompt) → 100 × cosine of their CLIP features.

    Args:
        folder: a CLIP model as ``save_pretrained`` writes it, with tokenizer and image processor.

    Raises:
        ValueError: transformers is missing, or the folder holds no CLIP model.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no CLIP model; name the folder of one that is on this machine")
    try:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    except ModuleNotFoundError as error:
        raise ValueError("CLIP needs transformers; run: pip install 'streamdiff[wan]'") from error
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        process = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds no readable CLIP model: {' '.join(str(error).split())[:200]}") from error

    @lru_cache(maxsize=8)
    @torch.inference_mode()
    def text_features(prompt: str) -> torch.Tensor:
        tokens = tokenizer([prompt], return_tensors="pt", truncation=True)
        return _features(model.get_text_features(**tokens))

    @torch.inference_mode()
    def judge(frame: np.ndarray, prompt: str) -> float:
        pixels = process(images=frame, return_tensors="pt")["pixel_values"]
        picture = _features(model.get_image_features(pixel_values=pixels))
        return float(100 * torch.cosine_similarity(picture, text_features(prompt)))

    return judge


def _features(output: object) -> torch.Tensor:
    """The projected features [1, D]; transformers 5 wraps them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
