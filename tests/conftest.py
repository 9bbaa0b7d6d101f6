"""Options and fixtures that every test may use."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-threads", type=int, default=1, help="CPU threads for torch (default 1: repeatable sums)")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--torch-threads")
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state; the value is there for generators of its own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of tensors recorded from the reference: STREAMDIFF_GOLDEN, or a folder beside the checkout."""
    default = REPOSITORY.parent / "shared" / "golden"
    folder = Path(os.environ.get("STREAMDIFF_GOLDEN", default))
    if not folder.is_dir():
        pytest.skip("no golden tensors: set STREAMDIFF_GOLDEN to their folder")
    return folder
