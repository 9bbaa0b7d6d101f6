"""The hub: facts before the transfer, nothing twice, one sentence when it fails."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from streamdiff_core.hub import check_disk, download, look_up
from streamdiff_core.types import CheckpointError

pytest.importorskip("huggingface_hub")
from tests.fake_hub import FakeHub  # noqa: E402


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path, monkeypatch)
    for name, size in [("model.pt", 1000), ("vae/config.json", 10), ("vae/weights.safetensors", 300), ("other.bin", 5)]:
        path = hub.folder / "team/model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return hub


def test_files_and_folders_with_size_hash_and_licence(hub):
    files = look_up("team/model", ["model.pt", "vae/"])
    assert [(f.name, f.size_bytes) for f in files] == [
        ("model.pt", 1000), ("vae/config.json", 10), ("vae/weights.safetensors", 300)
    ]  # fmt: skip
    text = str(files[0])
    assert "team/model/model.pt" in text and "apache-2.0" in text and files[0].sha256[:12] in text
    assert hub.transfers == [], "asking must not download"


def test_what_is_there_is_not_fetched_again(hub):
    paths = download(look_up("team/model", ["model.pt"]))
    assert paths["model.pt"].stat().st_size == 1000 and hub.transfers == ["team/model/model.pt"]
    download(look_up("team/model", ["model.pt"]))
    assert len(hub.transfers) == 1


def test_offline_works_once_everything_was_downloaded(hub):
    download(look_up("team/model", ["model.pt"]))
    hub.reachable = False
    assert download(look_up("team/model", ["model.pt"]))["model.pt"].exists()
    with pytest.raises(CheckpointError, match="the hub did not give team/model .no route.*'tiny' needs no download"):
        look_up("team/model", ["vae/weights.safetensors"])


def test_broken_transfer_says_how_to_resume(hub):
    files = look_up("team/model", ["model.pt"])
    hub.reachable = False
    with pytest.raises(CheckpointError, match="did not come .no route.; run the same command again to resume"):
        download(files)


def test_missing_file_is_named(hub):
    with pytest.raises(CheckpointError, match="team/model has no gone.pt"):
        look_up("team/model", ["model.pt", "gone.pt"])


def test_full_disk_is_noticed_before_the_transfer(hub, tmp_path, monkeypatch):
    files = look_up("team/model", ["model.pt"])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2_000_000_500))
    with pytest.raises(CheckpointError, match="0.0 GB .and 2 GB to spare.*set HF_HOME to a larger disk"):
        download(files)
    assert hub.transfers == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2_000_001_000))
    check_disk(files, tmp_path / "not" / "there" / "yet")
