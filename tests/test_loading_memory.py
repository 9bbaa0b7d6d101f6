"""Loading needs little more memory than the weights, whatever the file: measured in a process of its own.

Counted is memory that the system cannot take back: anonymous pages (``RssAnon``), sampled while loading. Pages of a
memory-mapped file are left out: they are the file, and are dropped when memory is short. "The weights" are those of
the model in its own number type, whether they end up in anonymous memory or stay mapped.

Each tensor is mapped by itself here, so that what the loader has freed counts no longer. Otherwise glibc takes blocks
below a moving limit (at most 32 MiB, so most of this model's and none of a 14B model's matrices) from one heap, where
freed ones stay as holes: up to 15 % of the weights more than the loader needs, by how they happen to lie.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamdiff_core.config import ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.weights import to_diffusers_keys

CONFIG = dict(dim=768, ffn_dim=3072, num_heads=6, num_layers=16, text_dim=256, text_len=16)
"""Some 155 M parameters: 310 MB in bfloat16."""
APART = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
"""Environment in which glibc gives every block from 64 KiB its own mapping, and hence back as soon as it is freed."""
LOAD = """
import json, sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch
from streamdiff_core.config import ModelConfig, get_preset
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.lora import merge_lora
from streamdiff_core.weights import load_checkpoint

def anonymous_bytes():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])

path, dtype, lora = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
model = empty_transformer(replace(get_preset("wan-1.3b"), model=ModelConfig(**json.loads(sys.argv[4]))), dtype)
torch.randn(256, 256) @ torch.randn(256, 256)
before, seen, done = anonymous_bytes(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(anonymous_bytes())
thread = threading.Thread(target=watch)
thread.start()
load_checkpoint(model, path)
if lora:
    merge_lora(model, lora)
model.fuse()
done.set()
thread.join()
seen.append(anonymous_bytes())
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": max(seen) - before, "weights": weights, "samples": len(seen)}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same random model in every kind of file, and a LoRA on all of its matrices."""
    folder = tmp_path_factory.mktemp("medium")
    state = CausalWanTransformer(ModelConfig(**CONFIG)).state_dict()
    half = {name: value.bfloat16() for name, value in state.items()}
    save_file(half, folder / "half.safetensors")
    save_file(to_diffusers_keys(state), folder / "float.safetensors")
    torch.save({"generator": {f"model.{name}": value for name, value in half.items()}}, folder / "half.pt")
    torch.save({"generator": {f"model.{name}": value for name, value in state.items()}}, folder / "float.pt")
    matrices = {name: x for name, x in half.items() if name.startswith("blocks.") and x.ndim == 2}
    style = {name.replace(".weight", ".lora_down.weight"): torch.ones(2, x.shape[1]) for name, x in matrices.items()}
    style |= {name.replace(".weight", ".lora_up.weight"): torch.ones(len(x), 2) for name, x in matrices.items()}
    save_file(style, folder / "style.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "dtype", "lora"),
    [
        ("half.safetensors", "bfloat16", ""),
        ("half.pt", "bfloat16", ""),
        ("float.safetensors", "bfloat16", ""),
        ("float.pt", "bfloat16", ""),
        ("half.safetensors", "float32", ""),
        ("float.pt", "bfloat16", "style.safetensors"),
    ],
)
def test_peak_is_at_most_115_percent_of_the_weights(files, name, dtype, lora):
    arguments = [str(files / name), dtype, str(files / lora) if lora else "", json.dumps(CONFIG)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, timeout=120, env=os.environ | APART
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] > 200e6 and found["samples"] > 10
    assert found["peak"] <= 1.15 * found["weights"]
