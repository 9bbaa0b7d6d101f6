"""Runs the notebooks in fresh kernels, as ``make notebooks`` does, and moves every slider in them.

    python notebooks/check.py [00_tour.ipynb ...] [--save]

A notebook passes if no cell raises, it takes less than 60 s of CPU time, and every widget redraws in less than 1 s and
shows something else at its other end. ``--save`` keeps the figures in the file (readers without a kernel see them) and
drops everything else a run leaves behind. Where the notebooks come from on Colab, Kaggle and Binder is defined here
once; ``--save`` writes it into every notebook and into README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
REPOSITORY, TAG = "your-org/streamdiff", "v0.1.0"
"""GitHub repository and tag that badges and install cells point at."""
MAX_CPU_S, MAX_MOVE_S, MAX_BYTES = 60.0, 1.0, 300_000
INSTALL = f"""\
import os, sys

if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    %pip install -q "streamdiff[notebooks] @ git+https://github.com/{REPOSITORY}@{TAG}"
%matplotlib inline"""
"""First code cell of every notebook."""


def move_sliders() -> list[dict]:
    """Move every widget of every ``interact`` panel (runs inside the notebook's kernel).

    Returns:
        Per widget: its name, the slowest redraw in s of CPU time, errors, how many different pictures it gave, and
        whether it redraws while being dragged.
    """
    import gc
    import hashlib
    import sys
    import time

    from IPython import get_ipython
    from ipywidgets import interactive

    def values(widget):
        if hasattr(widget, "options"):
            return list(range(len(widget.options)))
        if hasattr(widget, "min"):
            middle = widget.min + (widget.max - widget.min) // 2 // widget.step * widget.step
            return [widget.min, middle, widget.max]
        return [not widget.value, widget.value]

    report, errors, shell = [], [], get_ipython()
    shell.showtraceback = lambda *_, **__: errors.append(repr(sys.exc_info()[1]))
    shown = []
    shell.display_pub.register_hook(lambda message: shown.append(repr(message["content"].get("data"))))
    for panel in [x for x in gc.get_objects() if issubclass(type(x), interactive)]:
        for widget in panel.kwargs_widgets:
            trait = "index" if hasattr(widget, "options") else "value"
            before, seen, slowest_s = getattr(widget, trait), set(), 0.0
            for value in [*values(widget), before]:
                start_s = time.process_time()
                shown.clear()
                setattr(widget, trait, value)
                slowest_s = max(slowest_s, time.process_time() - start_s)
                seen |= {hashlib.sha256("".join(shown).encode()).hexdigest()} if shown else set()
            report.append(
                {
                    "widget": widget.description,
                    "slowest_s": slowest_s,
                    "errors": list(errors),
                    "pictures": len(seen),
                    "drags": bool(getattr(widget, "continuous_update", False)),
                }
            )
            errors.clear()
    return report


def run(notebook):
    """Execute every cell in a fresh kernel, then move the sliders.

    Args:
        notebook: an nbformat notebook; its cells get their outputs.

    Returns:
        CPU seconds of the cells, and what ``move_sliders`` reports.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the text shows which.
    """
    return asyncio.run(_run(notebook))


async def _run(notebook):
    """In one event loop: messages that arrive between two loops can be missed."""
    import nbformat
    from nbclient import NotebookClient

    client = NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(FOLDER)}})
    client.widget_registry = {}  # else it answers Output widgets while it waits, and a reply can be missed for ever
    probe = f"{inspect.getsource(move_sliders)}\nprint(json.dumps([time.process_time(), move_sliders()]))"
    async with client.async_setup_kernel():
        for i, cell in enumerate(notebook.cells):
            await client.async_execute_cell(cell, i)
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json, time\n{probe}"))
        report = await client.async_execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
    notebook.cells.pop()
    return json.loads(next(o.text for o in report.outputs if o.get("name") == "stdout"))


def complaints(cpu_s: float, moves: list[dict]) -> list[str]:
    """What a run shows that a notebook must not do; one sentence each."""
    found = [f"takes {cpu_s:.0f} s of CPU, more than {MAX_CPU_S:.0f}"] if cpu_s > MAX_CPU_S else []
    for move in moves:
        name = f"widget {move['widget']!r}"
        found += [f"{name} raised {error}" for error in move["errors"]]
        if move["slowest_s"] > MAX_MOVE_S:
            found.append(f"{name} took {move['slowest_s']:.1f} s to redraw, more than {MAX_MOVE_S:.0f}")
        if move["pictures"] < 2:
            found.append(f"{name} shows the same whatever its value")
        if move["drags"]:
            found.append(f"{name} redraws while it is dragged: set continuous_update=False")
    return found


def tidy(notebook, *, keep_figures: bool) -> None:
    """Drop what a run leaves behind; figures may stay, made small, but not those below a widget."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}  # fmt: skip
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")}
        if cell.cell_type == "code":
            cell.execution_count = None
            kinds = {kind for o in cell.outputs for kind in o.get("data", {})}
            keeps = keep_figures and "application/vnd.jupyter.widget-view+json" not in kinds
            figures = [o for o in cell.outputs if keeps and "image/png" in o.get("data", {})]
            cell.outputs = [_small_figure(o) for o in figures]


def _small_figure(output):
    """A figure's PNG in its smallest good form: 256 colours for drawings, JPEG for pictures of video."""
    import nbformat
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
    drawing, photo = io.BytesIO(), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(drawing, "PNG", optimize=True)
    picture.save(photo, "JPEG", quality=75, optimize=True)
    kind, best = ("jpeg", photo) if len(photo.getvalue()) < len(drawing.getvalue()) else ("png", drawing)
    data = {f"image/{kind}": base64.b64encode(best.getvalue()).decode() + "\n"}
    return nbformat.v4.new_output("display_data", data, metadata={})


def badges(name: str) -> str:
    """Links that open a notebook on Colab, Kaggle and Binder."""
    page = f"{REPOSITORY}/blob/{TAG}/notebooks/{name}"
    return (
        f"[Colab](https://colab.research.google.com/github/{page}) · "
        f"[Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{page}) · "
        f"[Binder](https://mybinder.org/v2/gh/{REPOSITORY}/{TAG}?labpath=notebooks/{name})"
    )


def write_links(text: str, name: str | None = None) -> str:
    """Text with every line or table cell of badges brought up to date; it names its notebook in the links."""
    one = r"\[Colab\]\([^)]*?/notebooks/([\w.]+)\) · \[Kaggle\]\([^)]*\) · \[Binder\]\([^)]*\)"
    return re.sub(one, lambda found: badges(name or found[1]), text)


def save(notebook, path: Path) -> None:
    """Write a tidied notebook with today's links and install cell."""
    import nbformat

    tidy(notebook, keep_figures=True)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source = INSTALL
    notebook.cells[0].source = write_links(notebook.cells[0].source, path.name)
    nbformat.write(notebook, path)


def main() -> int:
    """Run the notebooks named on the command line, or all; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the figures in the files, bring links up to date")
    options = parser.parse_args()
    import nbformat

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = False
    for path in options.notebooks or sorted(FOLDER.glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        cpu_s, moves = run(notebook)
        if options.save:
            save(notebook, path)
        found = complaints(cpu_s, moves)
        size = path.stat().st_size
        found += [f"has {size} bytes, more than {MAX_BYTES}"] if size > MAX_BYTES else []
        slowest_s = max((move["slowest_s"] for move in moves), default=0.0)
        print(
            f"{path.name}: {cpu_s:.1f} s CPU, {len(moves)} widgets, slowest redraw {slowest_s:.2f} s, {size // 1000} kB"
        )
        print(*(f"  {path.name} {line}" for line in found), sep="\n", end="\n" if found else "")
        failed |= bool(found)
    if options.save:
        index = FOLDER / "README.md"
        index.write_text(write_links(index.read_text(encoding="utf-8")), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
