"""Files of full-size presets from the Hugging Face hub: sizes, licence and hash shown, disk checked, resumable.

huggingface_hub does the transfer, the progress bars, the resume after a broken connection and the cache. Here: what a
preset needs, whether it fits, and one clear sentence when it does not come.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamdiff_core.types import CheckpointError

logger = logging.getLogger(__name__)

SPARE_BYTES = 2_000_000_000
"""Disk space that must stay free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One file of a hub repository."""

    repo: str
    """``organisation/name``."""
    name: str
    """Path in it."""
    size_bytes: int
    """Length."""
    sha256: str | None
    """Hash of a large file, None of a small one."""
    licence: str
    """Licence of the repository as its owner states it."""
    local: Path | None
    """Where it lies already, if it does."""

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}…" if self.sha256 else ""
        return f"{self.repo}/{self.name}: {self.size_bytes / 1e9:.2f} GB{digest}, licence {self.licence}"


def look_up(repo: str, names: Sequence[str]) -> list[RemoteFile]:
    """Facts of files, or of all files of folders (names that end in ``/``); the network is asked only for missing ones.

    Raises:
        CheckpointError: not reachable, or not there.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except Exception as error:  # no network, no such repository, no permission: many types, one meaning
        local = [(name, try_to_load_from_cache(repo, name)) for name in names]
        if all(isinstance(path, str) for _, path in local):  # everything was downloaded before
            return [
                RemoteFile(repo=repo, name=n, size_bytes=Path(p).stat().st_size, sha256=None, licence="see the hub",
                           local=Path(p)) for n, p in local
            ]  # fmt: skip
        raise CheckpointError(
            f"the hub did not give {repo} ({_first_line(error)}); check the connection, or that you accepted its terms "
            "on its page and ran: hf auth login. Preset 'tiny' needs no download"
        ) from error
    licence = str(getattr(info.card_data, "license", None) or "not stated")
    files = []
    for file in info.siblings or []:
        if not any(
            file.rfilename == name or (name.endswith("/") and file.rfilename.startswith(name)) for name in names
        ):
            continue
        path = try_to_load_from_cache(repo, file.rfilename)
        files.append(
            RemoteFile(
                repo=repo,
                name=file.rfilename,
                size_bytes=file.size or 0,
                sha256=file.lfs.sha256 if file.lfs else None,
                licence=licence,
                local=Path(path) if isinstance(path, str) else None,
            )
        )
    missing = [n for n in names if not any(f.name == n or (n.endswith("/") and f.name.startswith(n)) for f in files)]
    if missing:
        raise CheckpointError(f"{repo} has no {', '.join(missing)}; its owner may have moved it")
    return files


def check_disk(files: Sequence[RemoteFile], folder: Path) -> None:
    """Refuse a download that would fill the disk.

    Raises:
        CheckpointError: names what is needed, what is free, and the way out.
    """
    needed = sum(file.size_bytes for file in files if file.local is None)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed and needed + SPARE_BYTES > free:
        raise CheckpointError(
            f"the download needs {needed / 1e9:.1f} GB (and {SPARE_BYTES / 1e9:.0f} GB to spare), {folder} has "
            f"{free / 1e9:.1f} GB free; set HF_HOME to a larger disk, or use preset 'tiny'"
        )


def download(files: Sequence[RemoteFile]) -> dict[str, Path]:
    """All files, from the cache where they are there; name -> path. Ctrl-C is safe: the next call goes on.

    Raises:
        CheckpointError: no room, or the transfer failed.
    """
    from huggingface_hub import constants, hf_hub_download

    check_disk(files, Path(constants.HF_HUB_CACHE))
    paths = {}
    for file in files:
        if file.local is None:
            logger.info("%s", file)
        try:
            paths[file.name] = file.local or Path(hf_hub_download(file.repo, file.name))
        except Exception as error:
            raise CheckpointError(
                f"{file.repo}/{file.name} did not come ({_first_line(error)}); run the same command again to resume"
            ) from error
    return paths


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
