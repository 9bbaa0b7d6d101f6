"""Weight files on disk or on the hub: find them, open them safely, hand out a state dict.

What a file is, is read from its first bytes, never from its name. Pickles are only opened with
``weights_only=True``, so a checkpoint cannot run code. Whatever is wrong with a file comes out as one
``CheckpointError`` that names it. Key names and models are the business of ``weights.py``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from streamdiff_core.types import CheckpointError

WRAPPERS = ("generator", "generator_ema", "state_dict")
"""Entries of a pickled dict that may hold the weights, in upstream's order of preference (SPEC §1.3)."""
FILE_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.pt",
)
"""What a folder is searched for, each also as ``<name>.index.json`` with shards."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""Endings of weight files."""
MAX_LISTED = 8
"""Names spelled out per kind of problem in an error."""


def listed(names: Sequence[str]) -> str:
    """The first ``MAX_LISTED`` names, then an ellipsis."""
    return ", ".join(names[:MAX_LISTED]) + (", …" if len(names) > MAX_LISTED else "")


def find_file(source: str | Path, subfolder: str | None = None) -> Path:
    """The file to read: ``source`` itself, its shard index, or the known (or only) weight file of a folder.

    Raises:
        CheckpointError: nothing there, or several weight files of unknown names.
    """
    path = Path(source).expanduser()
    index = path.with_name(path.name + ".index.json")
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in SUFFIXES
    if looks_like_hub and not path.exists() and not index.exists():
        path = _download(str(source), subfolder)
    folder = path / (subfolder or "")
    if folder.is_dir():
        known = [folder / (name + end) for name in FILE_NAMES for end in ("", ".index.json")]
        others = [f for f in sorted(folder.iterdir()) if f.suffix in SUFFIXES]
        found = [f for f in known if f.exists()] or (others if len(others) == 1 else [])
        if not found:
            raise CheckpointError(
                f"{folder} holds none of {', '.join(FILE_NAMES)}; name one of its {len(others)} weight files"
            )
        return found[0]
    found = [p for p in (folder, index) if p.exists()]
    if not found:
        raise CheckpointError(f"{folder}: no such file or folder")
    return found[0]


def read_file(path: Path, wrapper: str | None = None) -> tuple[dict[str, Tensor], str | None, dict[str, str]]:
    """State dict, wrapper entry and metadata of a file or a shard index; tensors are memory-mapped.

    Raises:
        CheckpointError: the file cannot be read, or holds something else than a state dict.
    """
    try:
        if path.name.endswith(".index.json"):
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise CheckpointError("the index names files outside its folder")
            shards = [read_file(path.parent / name, wrapper) for name in sorted(names)]
            return {name: value for state, _, _ in shards for name, value in state.items()}, *shards[0][1:]
        with open(path, "rb") as file:
            start = file.read(32)
        if start[8:9] == b"{":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, None, file.metadata() or {}
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError("a Git LFS pointer, not the weights; run: git lfs pull")
        if not start.startswith((b"PK", b"\x80")):
            raise CheckpointError(f"neither safetensors nor a PyTorch file; it starts with {start[:16]!r}")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return *_unwrap(loaded, wrapper), {}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file may fail anywhere inside the readers
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        if os.strerror(errno.ENOMEM) in reason:
            raise CheckpointError(
                f"{path}: {path.stat().st_size / 1e9:.1f} GB are larger than this machine's memory and the system does "
                "not map them; add swap, or take a file in several shards"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: truncated, damaged, or holds more than tensors ({reason})"
        ) from error


def _unwrap(loaded: object, wrapper: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The state dict inside a pickled object, and the entry it was found in."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a state dict")
    wrapper = wrapper or next((name for name in WRAPPERS if name in loaded), None)
    if wrapper and not isinstance(loaded.get(wrapper), Mapping):
        raise CheckpointError(f"no state dict under {wrapper!r}; entries: {listed([str(k) for k in loaded])}")
    state = dict(loaded[wrapper] if wrapper else loaded)
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor) or type(name) is not str]
    if strange:
        raise CheckpointError(f"{len(strange)} entries that are no named tensors ({listed(strange)})")
    return state, wrapper


def _download(repository: str, subfolder: str | None) -> Path:
    """Known weight files of a Hugging Face hub repository, in its local cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repository}: no such file or folder here; for hub repositories: pip install huggingface_hub"
        ) from None
    names = [*FILE_NAMES, *(f"{Path(n).stem}-*-of-*{Path(n).suffix}" for n in FILE_NAMES)]
    names += [f"{name}.index.json" for name in FILE_NAMES]
    try:
        inside = f"{subfolder}/" if subfolder else ""
        return Path(snapshot_download(repository, allow_patterns=[inside + name for name in names]))
    except Exception as error:  # no network, no such repository, no permission: many types, one meaning
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{repository}: no such file or folder here, and the hub said: {reason[0][:200]}"
        ) from error
