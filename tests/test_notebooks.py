"""Notebooks: their form, and the runner that executes them and moves their sliders (``make notebooks``).

The notebooks themselves are run by ``make notebooks``, which CI calls after the tests.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from statistics import median

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
_spec = importlib.util.spec_from_file_location("check_notebooks", FOLDER / "check.py")
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)

NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
MAX_FUNCTION_LINES, MAX_FUNCTIONS, MAX_MEDIAN_LINES = 15, 2, 8


def load(path: Path):
    return nbformat.read(path, as_version=4)


def sources(notebook) -> list[str]:
    """Code cells without magics."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return ["\n".join(line for line in s.splitlines() if not line.lstrip().startswith(("%", "!"))) for s in cells[1:]]


def functions(notebook) -> list[ast.FunctionDef]:
    trees = [ast.parse(source) for source in sources(notebook)]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@every_notebook
def test_is_clean_and_small(path):
    """What is in the file is what ``check.py --save`` writes: no counters, only figures as output."""
    notebook = load(path)
    nbformat.validate(notebook)
    assert path.stat().st_size <= check.MAX_BYTES
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert all(set(o.get("data", {})) in ({"image/png"}, {"image/jpeg"}) for o in cell.outputs)


@every_notebook
def test_links_and_install_cell_are_current(path):
    notebook = load(path)
    assert check.badges(path.name) in notebook.cells[0].source
    assert next(cell for cell in notebook.cells if cell.cell_type == "code").source == check.INSTALL


@every_notebook
def test_logic_stays_in_the_core(path):
    notebook = load(path)
    found = functions(notebook)
    assert len(found) <= MAX_FUNCTIONS
    assert all(f.end_lineno - f.lineno + 1 <= MAX_FUNCTION_LINES for f in found)
    assert median(len(source.splitlines()) for source in sources(notebook)) <= MAX_MEDIAN_LINES
    assert not any(re.search(r"\b(import|from)\s+\S*\._", source) for source in sources(notebook))


@every_notebook
def test_claims_are_asserted_and_figures_stay(path):
    notebook = load(path)
    asserts = [node for s in sources(notebook) for node in ast.walk(ast.parse(s)) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 2
    assert not any(isinstance(node.test, ast.Constant) for node in asserts)
    assert any(cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "run check.py --save"
    sliders = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and "interact(" in cell.source]
    for i in sliders:
        rest = [cell for cell in notebook.cells[i + 1 :] if cell.cell_type == "code"]
        assert rest and rest[0].outputs, f"no static figure follows the widget of cell {i}"


@every_notebook
def test_solutions_are_hidden(path):
    """An exercise has its answer in a closed <details>."""
    text = "\n".join(cell.source for cell in load(path).cells if cell.cell_type == "markdown")
    assert "Exercise" in text and "<details>" in text and "<details open" not in text
    assert text.count("<details>") == text.count("</details>")


def test_index_names_every_notebook():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"]({path.name})" in text and check.badges(path.name) in text
    assert check.write_links(text) == text


# --- the runner -------------------------------------------------------------------------------------------------


def notebook_of(*cells: str):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


PANEL = "from ipywidgets import interact, IntSlider, Dropdown\n"


BURN = """
def burn(slow):
    end_s = time.process_time() + 1.2 * slow
    while time.process_time() < end_s:
        pass
    return slow
"""


@pytest.fixture(scope="module")
def moves():
    """One run with a good panel and four bad ones; by name of the widget's parameter."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    notebook = notebook_of(
        "%matplotlib inline\nimport time\nfrom streamdiff_core import viz",
        f"{PANEL}interact(lambda good: viz.draw_curves({{'a': [0, good]}}), "
        "good=IntSlider(min=0, max=4, value=1, continuous_update=False));",
        f"{PANEL}interact(lambda fails: 1 / (4 - fails), fails=IntSlider(min=0, max=4, continuous_update=False));",
        f"{PANEL}interact(lambda same: 7, same=Dropdown(options=['a', 'b']));",
        f"{PANEL}interact(lambda drags: drags, drags=IntSlider(min=0, max=4));",
        f"{PANEL}{BURN}interact(burn, slow=IntSlider(min=0, max=1, value=0, continuous_update=False));",
    )
    cpu_s, report = check.run(notebook)
    return cpu_s, {move["widget"]: move for move in report}


def test_a_good_widget_passes(moves):
    cpu_s, report = moves
    assert set(report) == {"good", "fails", "same", "drags", "slow"} and 0 < cpu_s < 60
    assert check.complaints(1.0, [report["good"]]) == [] and report["good"]["pictures"] == 4  # 0, 2, 4 and 1 again


@pytest.mark.parametrize(
    ("widget", "complaint"),
    [
        ("fails", "'fails' raised ZeroDivisionError('division by zero')"),
        ("same", "'same' shows the same whatever its value"),
        ("drags", "'drags' redraws while it is dragged"),
        ("slow", "s to redraw, more than 1"),
    ],
)
def test_a_bad_widget_is_reported(moves, widget, complaint):
    found = check.complaints(1.0, [moves[1][widget]])
    assert len(found) == 1 and complaint in found[0]


def test_a_cell_that_raises_fails_the_run():
    with pytest.raises(Exception, match="it broke"):
        check.run(notebook_of("raise RuntimeError('it broke')"))


def test_a_long_run_is_reported():
    assert check.complaints(61.0, []) == ["takes 61 s of CPU, more than 60"]


def test_tidy_keeps_figures_only():
    notebook = notebook_of(
        "%matplotlib inline\nfrom streamdiff_core import viz\nprint('text')\nviz.draw_curves({'a': [1, 2]})",
        f"{PANEL}interact(lambda n: viz.draw_curves({{'a': [0, n]}}), n=IntSlider(continuous_update=False));",
    )
    check.run(notebook)
    full = len(notebook.cells[0].outputs[-1].data["image/png"])
    check.tidy(notebook, keep_figures=True)
    (figure,) = notebook.cells[0].outputs
    assert set(figure.data) == {"image/png"} and len(figure.data["image/png"]) < full
    assert notebook.cells[1].outputs == [] and notebook.cells[0].execution_count is None


def test_links_are_written_from_one_place(monkeypatch):
    text = f"| tour | {check.badges('00_tour.ipynb')} |"
    monkeypatch.setattr(check, "TAG", "v9.9.9")
    assert "v9.9.9" in check.badges("00_tour.ipynb")
    assert check.write_links(text) == f"| tour | {check.badges('00_tour.ipynb')} |"
