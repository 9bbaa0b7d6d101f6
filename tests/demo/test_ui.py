"""The page as files and as Gradio's configuration: complete, labelled, offline, and light to import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo extra is not installed")

from demo.ui import FIRST_STYLE, STATIC, STYLES, SWITCH_CHOICES, Choices, build_ui, page_settings  # noqa: E402
from streamdiff_core.drift import THRESHOLDS  # noqa: E402
from streamdiff_core.stream_options import SWITCHES  # noqa: E402
from streamdiff_core.training.prompts import DEFAULT_PROMPTS  # noqa: E402

TEXT_FILES = sorted(path for path in STATIC.rglob("*") if path.suffix in {".js", ".css", ".html", ".svg", ".json"})
SCRIPTS = [path for path in TEXT_FILES if path.suffix == ".js"]
SETTINGS = {
    "prompt", "on_switch", "noise_scale", "steps", "motion_adaptive", "sink_frames", "window_frames", "policy",
    "positions", "schedule", "seed", "max_fps",
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> dict:
    return build_ui().config


def controls(config: dict) -> list[dict]:
    kinds = {"textbox", "slider", "radio", "checkbox", "dropdown", "number"}
    return [component for component in config["components"] if component["type"] in kinds]


class Tags(HTMLParser):
    """Opening tags with their attributes, and whether each stands inside a <label>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.in_label = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.in_label += tag == "label"
        self.tags.append((tag, {**dict(attrs), "in label": bool(self.in_label)}))

    def handle_endtag(self, tag: str) -> None:
        self.in_label -= tag == "label"


def page_tags() -> list[tuple[str, dict]]:
    return [tag for path in sorted(STATIC.glob("*.html")) for tag in Tags(path.read_text(encoding="utf-8")).tags]


def test_every_control_has_an_id_and_a_label(config: dict) -> None:
    found = controls(config)
    assert len(found) == len(SETTINGS)
    assert all(re.fullmatch(r"sd-[a-z-]+", control["props"]["elem_id"]) for control in found)
    assert all(control["props"]["label"] for control in found)


def test_controls_call_the_browser_only(config: dict) -> None:
    assert len(config["dependencies"]) == len(SETTINGS) + 1
    for event in config["dependencies"]:
        assert event["backend_fn"] is False and "window.streamdiff." in event["js"]
    script = " ".join(event["js"] for event in config["dependencies"])
    assert all(name in script for name in SETTINGS)


def test_the_stream_can_write_every_control(config: dict) -> None:
    (sync,) = [event for event in config["dependencies"] if "controlValues" in event["js"]]
    order = json.loads(re.search(r"\[.*\]", sync["js"]).group())
    ids = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    assert set(order) == SETTINGS
    assert ids[sync["outputs"][order.index("noise_scale")]] == "sd-noise"
    assert ids[sync["outputs"][order.index("seed")]] == "sd-seed"


def test_choices_of_the_model_reach_the_controls() -> None:
    choices = Choices(
        noise_scale=0.8, max_steps=3, policies=("a", "b"), titles={"a": "Rule"}, schedules=("c",), window_frames=5
    )
    props = {c["props"]["elem_id"]: c["props"] for c in controls(build_ui(choices).config)}
    assert props["sd-noise"]["value"] == 0.8
    assert props["sd-steps"]["maximum"] == 3
    assert list(map(tuple, props["sd-policy"]["choices"])) == [("a: Rule", "a"), ("b", "b")]
    assert props["sd-schedule"]["value"] == "c"
    assert props["sd-window"]["value"] == 5


def test_switch_policies_are_the_core_s() -> None:
    names = [name for _, name in SWITCH_CHOICES]
    assert {"keep", "recache", "flush", "reset"} <= set(names) <= set(SWITCHES)
    assert len(names) == len(set(names))
    assert all(len(text.split()) >= 5 for text, _ in SWITCH_CHOICES), "say what each one does"


def test_drift_bars_end_where_the_meter_says_much() -> None:
    text = (STATIC / "meters.js").read_text(encoding="utf-8")
    limits = dict(re.findall(r"(\w+): ([\d.]+)", re.search(r"MUCH_DRIFT = \{(.*)\}", text).group(1)))
    assert {name: float(limit) for name, limit in limits.items()} == {n: much for n, (_, much) in THRESHOLDS.items()}


def test_gallery_shows_the_styles_of_the_bundled_model(config: dict) -> None:
    assert {style["style"]: style["prompt"] for style in STYLES} == DEFAULT_PROMPTS
    pictures = {path.name for path in (STATIC / "gallery").glob("*.webp")}
    assert pictures == {style["picture"] for style in STYLES}
    (gallery,) = [c for c in config["components"] if c["props"].get("elem_id") == "sd-gallery"]
    pressed = re.findall(r'data-testid="style-(\w+)"[^>]*aria-pressed="true"', gallery["props"]["value"])
    assert pressed == [FIRST_STYLE]
    assert all(f'src="page/gallery/{name}"' in gallery["props"]["value"] for name in pictures)


def test_thumbnails_are_small_squares() -> None:
    from PIL import Image

    for style in STYLES:
        path = STATIC / "gallery" / style["picture"]
        with Image.open(path) as picture:
            assert picture.width == picture.height >= 144
        assert path.stat().st_size < 20_000


@pytest.mark.parametrize("path", TEXT_FILES, ids=lambda path: path.name)
def test_nothing_comes_from_another_host(path: Path) -> None:
    addresses = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}[^\s'\"]*", path.read_text(encoding="utf-8"))
    assert [a for a in addresses if not a.startswith("http://www.w3.org/")] == []  # the names of SVG, never fetched


def test_theme_and_head_stay_on_this_host() -> None:
    settings = page_settings()
    assert "//" not in settings["head"]
    assert all(not isinstance(font, str) or "http" not in font for font in settings["theme"]._stylesheets)
    assert settings["theme"]._stylesheets == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_imported_scripts_exist_and_are_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"from \"\./([\w.]+)\"", text):
        assert (STATIC / name).exists()
    assert len(text.splitlines()) < 300


def test_scripts_find_their_elements() -> None:
    """Every id that a script asks for stands in the page."""
    ids = {attributes["id"] for _, attributes in page_tags() if "id" in attributes}
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    asked = set(re.findall(r"#(sd-[a-z0-9-]+)", scripts)) - {"sd-download-", "sd-"}
    asked |= {
        f"sd-{name}" for name in re.findall(r"(?:find|put|chip|(?:stage|this)\.toggle)\(\"([a-z0-9-]+)\"", scripts)
    }
    assert {"sd-status", "sd-split", "sd-fps", "sd-link", "sd-record"} <= asked
    assert asked - ids - {"sd-meters", "sd-gallery", "sd-sync"} == set()  # these three are Gradio's elem_id


def test_everything_that_can_be_used_has_a_name() -> None:
    for path in sorted(STATIC.glob("*.html")):
        tags = Tags(path.read_text(encoding="utf-8"))
        assert len({a["id"] for _, a in tags.tags if "id" in a}) == sum("id" in a for _, a in tags.tags)
        for tag, attributes in tags.tags:
            if tag in ("button", "input", "select"):
                assert "data-testid" in attributes, attributes
            if tag in ("input", "select"):
                assert attributes["in label"] or "aria-label" in attributes, attributes
            if tag == "canvas":
                assert "aria-label" in attributes or attributes.get("aria-hidden") == "true", attributes


def test_import_loads_no_model_code() -> None:
    script = "import demo.ui, sys\nprint([m for m in ('torch', 'av', 'streamdiff_core') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=STATIC.parent.parent)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_server_offers_what_the_page_asks_for() -> None:
    from fastapi.testclient import TestClient

    from demo.app import create_app

    def no_model() -> None:
        raise ValueError("this test needs none")

    app = create_app(no_model)
    try:
        client = TestClient(app)
        page = client.get("/").text
        asked = set(re.findall(r"(?:src|href)=\\?[\"'](page/[\w./-]+)", page)) | {"sample.mp4"}
        assert {"page/stream.js", "page/style.css", "page/icon.svg", "page/gallery/comic.webp"} <= asked
        asked |= {f"page/{path.name}" for path in SCRIPTS}
        asked |= {"static/js/iframeResizer.contentWindow.min.js"}  # Gradio's own, needed inside the frame of a Space
        assert {address for address in asked if client.get(f"/{address}").status_code != 200} == set()
    finally:
        app.state.engine.shutdown()
