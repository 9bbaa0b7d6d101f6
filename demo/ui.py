"""The page's layout and controls as Gradio Blocks; no model, no frames and no server code.

Pictures and figures live in ``static/*.html`` and are drawn by ``static/*.js``. A control here calls
``window.streamdiff`` in the browser, which tells the stream over its own socket: no Gradio event reaches the server.
The other way round, the script clicks a hidden button that writes the stream's real settings into the controls.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).parent / "static"
STYLES: list[dict[str, str]] = json.loads((STATIC / "gallery" / "styles.json").read_text(encoding="utf-8"))
FIRST_STYLE = "comic"
SWITCH_CHOICES = [
    ("Keep: the past stays, the look follows", "keep"),
    ("Fade: one look slides into the other", "fade"),
    ("Recache: the past, read in the new style", "recache"),
    ("Flush: only sinks and last frames stay", "flush"),
    ("Reset: the past is forgotten, start anew", "reset"),
]
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What the loaded model offers, and where its controls stand at first."""

    noise_scale: float = 0.45
    """Amount of noise put on the input."""
    steps: int = 2
    """Denoising steps per chunk."""
    max_steps: int = 4
    """Highest number of steps."""
    sink_frames: int = 1
    """Latent frames never evicted."""
    window_frames: int = 3
    """Latent frames remembered last."""
    max_cache_frames: int = 12
    """Upper end of the sink and window sliders."""
    schedules: tuple[str, ...] = ("stream_batch", "sequential")
    """Names of denoise schedules."""
    policies: tuple[str, ...] = ("sink",)
    """Names of KV policies."""
    positions: tuple[str, ...] = ("packed", "absolute", "slots", "ahead", "wrap")
    """Names of position maps."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """What a policy or schedule does, by name."""


def page_settings() -> dict[str, Any]:
    """Arguments for ``gr.mount_gradio_app``: theme, style sheet, scripts; nothing from another host."""
    head = (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="page/icon.svg" type="image/svg+xml">'
        '<link rel="stylesheet" href="page/style.css">'
        '<script type="module" src="page/stream.js"></script>'
    )
    return {"theme": page_theme(), "head": head, "footer_links": []}


def page_theme() -> gr.themes.Base:
    """Colours and fonts of all pages; the fonts are the system's."""
    return gr.themes.Soft(
        primary_hue="violet",
        neutral_hue="slate",
        radius_size="lg",
        font=SYSTEM_FONTS,
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )


def build_ui(choices: Choices | None = None) -> gr.Blocks:
    """The page. Beside it the server offers the folder ``STATIC`` as ``page/``, ``sample.mp4`` and ``stream``.

    Not as ``static/``: that address belongs to Gradio's own files.
    """
    choices = choices or Choices()
    with gr.Blocks(title="streamdiff live", fill_width=True, analytics_enabled=False) as page:
        _html("header.html", elem_id="sd-header")
        with gr.Row(elem_id="sd-layout"):
            with gr.Column(elem_id="sd-stage-column", min_width=0):
                _html("stage.html")
            with gr.Column(elem_id="sd-controls", min_width=0):
                controls = _controls(choices)
            with gr.Column(elem_id="sd-meters", min_width=0):
                _html("meters.html")
        sync = gr.Button("Show the stream's settings", elem_id="sd-sync", visible="hidden")
        order = json.dumps(list(controls))
        sync.click(
            fn=None, js=f"() => window.streamdiff.controlValues({order})", outputs=list(controls.values()), queue=False
        )
    return page


def _html(name: str, **where: Any) -> gr.HTML:
    text = (STATIC / name).read_text(encoding="utf-8")
    return gr.HTML(text, container=False, padding=False, apply_default_css=False, **where)


def _controls(choices: Choices) -> dict[str, gr.components.Component]:
    """Controls by the name of the setting they show; each calls JavaScript only."""
    first = next(style for style in STYLES if style["style"] == FIRST_STYLE)
    controls: dict[str, gr.components.Component] = {}
    controls["prompt"] = gr.Textbox(
        first["prompt"],
        label="Prompt",
        placeholder="Describe a look, then press Enter",
        lines=1,
        max_lines=2,
        max_length=300,
        submit_btn="Apply",
        elem_id="sd-prompt",
    )
    gr.HTML(gallery_html(STYLES), container=False, padding=False, apply_default_css=False, elem_id="sd-gallery")
    controls["on_switch"] = gr.Radio(
        SWITCH_CHOICES, value="keep", label="When the prompt changes", elem_id="sd-on-switch"
    )
    controls["noise_scale"] = gr.Slider(
        0.05, 1, choices.noise_scale, step=0.05, label="Noise: true to the input ↔ free", elem_id="sd-noise"
    )
    controls["steps"] = gr.Slider(
        1, choices.max_steps, choices.steps, step=1, label="Steps: fast ↔ fine", elem_id="sd-steps"
    )
    controls["motion_adaptive"] = gr.Checkbox(
        True, label="Less noise while the picture moves", elem_id="sd-motion-adaptive"
    )
    with gr.Accordion("Memory, schedule and seed", open=False, elem_id="sd-more"):
        controls |= _more_controls(choices)

    for name, control in controls.items():
        if name == "prompt":
            control.submit(fn=None, js="(v) => { window.streamdiff.prompt(v); return []; }", inputs=[control])
        else:
            js = f"(v) => {{ window.streamdiff.set({{ {name}: v }}); return []; }}"
            control.input(fn=None, js=js, inputs=[control])
    return controls


def _more_controls(choices: Choices) -> dict[str, gr.components.Component]:
    most = choices.max_cache_frames
    controls: dict[str, gr.components.Component] = {}
    controls["sink_frames"] = gr.Slider(
        0, most, choices.sink_frames, step=1, label="Sinks: first frames, kept for ever", elem_id="sd-sinks"
    )
    controls["window_frames"] = gr.Slider(
        1, most, choices.window_frames, step=1, label="Window: last frames kept", elem_id="sd-window"
    )
    controls["policy"] = _dropdown("KV policy", choices.policies, "sd-policy", choices.titles)
    controls["schedule"] = _dropdown("Schedule", choices.schedules, "sd-schedule", choices.titles)
    with gr.Row():
        controls["positions"] = _dropdown("Positions in time", choices.positions, "sd-positions", {})
        controls["seed"] = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=120, elem_id="sd-seed")
    controls["max_fps"] = gr.Radio(
        [("16 a second, as the model was trained", 16), ("30 a second", 30)],
        value=30,
        label="Frames taken from the source",
        elem_id="sd-max-fps",
    )
    return controls


def _dropdown(label: str, names: tuple[str, ...], elem_id: str, titles: Mapping[str, str]) -> gr.Dropdown:
    labelled = [(f"{name}: {titles[name]}" if name in titles else name, name) for name in names]
    return gr.Dropdown(labelled, value=names[0], label=label, min_width=120, elem_id=elem_id)


def gallery_html(styles: list[dict[str, str]]) -> str:
    """Thumbnails as buttons: a click is a prompt change."""
    buttons = []
    for style in styles:
        name, prompt = html.escape(style["label"]), html.escape(style["prompt"], quote=True)
        pressed = "true" if style["style"] == FIRST_STYLE else "false"
        buttons.append(
            f'<button type="button" class="sd-style" data-testid="style-{style["style"]}" data-prompt="{prompt}"'
            f' aria-pressed="{pressed}" title="{prompt}">'
            f'<img src="page/gallery/{style["picture"]}" width="72" height="72" alt="">'
            f"<span>{name}</span></button>"
        )
    return f'<div class="sd-gallery" role="group" aria-label="Styles">{"".join(buttons)}</div>'
