"""The written part of a comparison: one CSV of all frames, and one HTML page that needs nothing but itself.

The page holds its pictures; the grid video too while it is small, else it plays the file beside it.
"""

from __future__ import annotations

import base64
import csv
import html
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from streamdiff_core import __version__
from streamdiff_core.compare_plan import Cell, Comparison
from streamdiff_core.compare_scores import FIGURES, Figure
from streamdiff_core.option_names import show_value
from streamdiff_core.restyle import prompt_text

MAX_EMBEDDED_BYTES = 12_000_000
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --paper: #fff; --line: #d0d7de; --best: #e6f4ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --paper: #0d1117; --line: #30363d; --best: #12361f; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1280px; padding: 24px; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .faint, figcaption { color: var(--faint); } .failed { color: #c0392b; }
video, img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
@media (max-width: 600px) { td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; } }
.scroll img { min-width: 640px; } th small { display: block; font-weight: 400; color: var(--faint); }
td.best { background: var(--best); font-weight: 600; } td.reason { text-align: left; white-space: normal; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; } code, pre { font-size: .9em; } pre { overflow-x: auto; }
"""


class ScoreTable(AbstractContextManager):
    """Figures of every frame of every cell, kept and written line by line.

    Args:
        path: the CSV; columns cell, frame, time_s and the figures by their names.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.rows: dict[str, list[Mapping[str, float]]] = {}
        """Per label the figures of its frames, in order."""
        self._fps = fps
        self._file = open(path, "w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["cell", "frame", "time_s", *(figure.name for figure in FIGURES)])

    def add(self, label: str, frame: int, figures: Mapping[str, float]) -> None:
        """The figures of one frame; what is missing or NaN stays empty."""
        self.rows.setdefault(label, []).append(figures)
        values = (figures.get(figure.name, math.nan) for figure in FIGURES)
        shown = ("" if math.isnan(value) else f"{value:.6g}" for value in values)
        self._writer.writerow([label, frame, f"{frame / self._fps:.4f}", *shown])

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_report(
    path: Path, comparison: Comparison, cells: Sequence[Cell], *, grid: Path, sheet: Path, curves: Path
) -> None:
    """The page, from files that are there already and lie beside it."""
    base, failed = comparison.base, [cell for cell in cells if cell.error]
    prompts = " → ".join(map(prompt_text, [base.prompt, *(e.prompt for e in base.events if hasattr(e, "prompt"))]))
    varied = "; ".join(f"{name}: {', '.join(map(show_value, values))}" for name, values in comparison.vary.items())
    fixed = ", ".join(f"{name}={show_value(value)}" for name, value in comparison.settings.items())
    otherwise = ", ".join(f"{name}={show_value(value)}" for name, value in _untouched(comparison).items())
    seed = "varied" if "seed" in comparison.vary else comparison.settings.get("seed", base.options.seed)
    facts = {
        "Prompt": f"“{prompts}”",
        "Varied": varied,
        "Fixed": f"{fixed}; else {otherwise}" if fixed else f"the preset's own settings: {otherwise}",
        "Input": f"{base.input}, {base.num_frames} frames at {base.fps:g} per second, "
                 f"{base.options.width}×{base.options.height}",
        "Noise": f"the same in all cells, seed {seed}" if seed != "varied" else "seeds differ, as asked for",
        "Model": f"preset {base.preset}, weights {base.model_sha256[:12]}, streamdiff {__version__}",
    }  # fmt: skip
    figures = [f for f in FIGURES if any(f.name in cell.summary for cell in cells)]
    text = "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>streamdiff compare: {html.escape(varied)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(varied)}</h1>",
        f'<p class="faint">{len(cells)} cells, same frames in each'
        + (f', <span class="failed">{len(failed)} failed</span>' if failed else "") + "</p>",
        "<dl>", *(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()), "</dl>",
        "<h2>Side by side</h2>", _video(grid),
        "<h2>Figures over the whole clip</h2>", _table(cells, figures), *_remarks(cells),
        "<h2>Over time</h2>", _picture(curves, "Running means of every figure over time"),
        "<h2>Moments</h2>", _picture(sheet, "Six moments of the input and of every cell"),
        "<h2>How it was measured</h2>",
        "<dl>", *(f"<dt>{f.title}, {f.unit}</dt><dd>{html.escape(f.meaning)}</dd>" for f in figures), "</dl>",
        "<h2>Make it again</h2>",
        f"<pre>streamdiff compare {html.escape(shlex.quote(base.input))} --recipe recipe.json -o again/</pre>",
        "<p class='faint'>Every frame's figures: scores.csv.</p></body></html>",
    ])  # fmt: skip
    path.write_text(text + "\n", encoding="utf-8")


def _table(cells: Sequence[Cell], figures: Sequence[Figure]) -> str:
    best = {figure.name: _best(figure, cells) for figure in figures}
    hints = {"low": "lower is better", "high": "higher is better", "one": "1 is as the input", "none": ""}
    heads = "".join(
        f"<th>{f.title}<small>{f.unit}</small><small>{hints[f.better]}</small></th>" for f in figures
    )  # fmt: skip
    lines = [f'<div class="scroll"><table><thead><tr><th>Cell</th>{heads}</tr></thead><tbody>']
    for cell in cells:
        name = f"<td>{html.escape(cell.label)}</td>"
        if cell.error:
            why = f'<td class="reason failed" colspan="{len(figures)}">failed: {html.escape(cell.error)}</td>'
            lines.append(f"<tr>{name}{why}</tr>")
            continue
        values = [(f, cell.summary.get(f.name, math.nan)) for f in figures]
        shown = (f"<td{' class=best' if _number(v) == best[f.name] else ''}>{_number(v)}</td>" for f, v in values)
        lines.append(f"<tr>{name}{''.join(shown)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _untouched(comparison: Comparison) -> dict[str, Any]:
    """Options that a reader asks for first, as far as the comparison leaves them to the preset."""
    o, set_here = comparison.base.options, {*comparison.vary, *comparison.settings}
    values = {name: getattr(o, name) for name in ("steps", "schedule", "policy", "clean_pass", "noise_scale")}
    values |= {name: getattr(o.cache, name) for name in ("sink_frames", "window_frames", "positions")}
    return {name: value for name, value in values.items() if name not in set_here}


def _remarks(cells: Sequence[Cell]) -> list[str]:
    """How to read the table, and which cells cannot be told apart."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        if cell.pictures_sha256:
            groups.setdefault(cell.pictures_sha256, []).append(cell.label)
    same = [f"Same pictures, bit for bit: {' and '.join(labels)}." for labels in groups.values() if len(labels) > 1]
    texts = ["Shaded: the best of a column, however small its lead.", *same]
    return [f'<p class="faint">{html.escape(text)}</p>' for text in texts]


def _best(figure: Figure, cells: Sequence[Cell]) -> str | None:
    """The number to mark, as it is shown; None where nothing is better or all cells show the same."""
    cost = {"low": lambda v: v, "high": lambda v: -v, "one": lambda v: abs(v - 1)}.get(figure.better)
    known = [c.summary[figure.name] for c in cells if math.isfinite(c.summary.get(figure.name, math.nan))]
    if cost is None or len(set(map(_number, known))) < 2:
        return None
    return _number(min(known, key=cost))


def _number(value: float) -> str:
    """Three digits, so that a column lines up: 0.520, 13.0, 1,204."""
    return "–" if math.isnan(value) else f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"


def _video(path: Path) -> str:
    small = path.stat().st_size <= MAX_EMBEDDED_BYTES
    source = _data(path, "video/mp4") if small else path.name
    return f'<video src="{source}" controls loop muted playsinline></video><p class="faint">File: {path.name}</p>'


def _picture(path: Path, text: str) -> str:
    return f'<div class="scroll"><img src="{_data(path, "image/png")}" alt="{html.escape(text)}"></div>'


def _data(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
