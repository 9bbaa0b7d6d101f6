"""Writes the table of predictions for full-size presets on 1-8 GPUs, beside the paper's figures.

    python benchmarks/forecast.py --out benchmarks/results

No GPU is needed: it is arithmetic on counted work (``streamdiff_core.forecast``). On a machine with a GPU the figures
to hold against it come from ``streamdiff bench --preset wan-1.3b --random-weights --steps 1,2,3,4 --report``, once as
it is (480p) and once with ``--size 512x512``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from streamdiff_core.forecast import to_markdown
from streamdiff_core.machine import source_commit


def main() -> None:
    """Write the forecast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default %(default)s)")
    parser.add_argument("--max-gpus", type=int, default=8, help="largest number of GPUs (default %(default)s)")
    args = parser.parse_args()
    path = args.out / f"full-size_forecast_{time.strftime('%Y%m')}.md"
    made = f"Made by `benchmarks/forecast.py` on {time.strftime('%Y-%m-%d')}, commit {source_commit()}."
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{to_markdown(max_gpus=args.max_gpus)}\n{made}\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
