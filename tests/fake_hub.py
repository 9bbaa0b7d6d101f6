"""A hub on disk: repositories are folders, and every question and transfer is noted."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub


class FakeHub:
    """``folder/organisation/name/file`` is what the hub has; ``cache`` is what was downloaded."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.cache = folder / "hub", folder / "cache"
        self.transfers: list[str] = []
        self.reachable = True
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, repo, **kw: self.model_info(repo))
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.try_to_load_from_cache)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(self.cache))

    def model_info(self, repo: str):
        if not self.reachable:
            raise ConnectionError("no route")
        root = self.folder / repo
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        siblings = [
            SimpleNamespace(
                rfilename=str(path.relative_to(root)),
                size=path.stat().st_size,
                lfs=SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest()),
            )
            for path in files
        ]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="apache-2.0"))

    def try_to_load_from_cache(self, repo: str, name: str):
        path = self.cache / repo / name
        return str(path) if path.exists() else None

    def hf_hub_download(self, repo: str, name: str) -> str:
        if not self.reachable:
            raise ConnectionError("no route")
        self.transfers.append(f"{repo}/{name}")
        target = self.cache / repo / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / repo / name, target)
        return str(target)
