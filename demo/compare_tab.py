"""The page ``compare/``: a short clip through several settings, side by side; ``streamdiff compare`` with a mouse.

Everything it makes comes from ``streamdiff_core.compare``. The work is done in the live engine's own thread while no
live stream needs the model, one comparison at a time; closing the page or Cancel ends it.
"""

from __future__ import annotations

import html
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from streamdiff_core import LiveEngine, PauseWork, Preset, ServerFullError, StreamPipeline, VideoReadError
from streamdiff_core.compare import GRID_NAME, RECIPE_NAME, REPORT_NAME, SCORES_NAME, compare
from streamdiff_core.compare_plan import plan
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.mechanisms import list_mechanisms
from streamdiff_core.restyle import stream_size
from streamdiff_core.schedules import SCHEDULES
from streamdiff_core.video_io import probe

MAX_SECONDS, MAX_CELLS, MAX_UPLOAD_BYTES, MAX_PROMPT_CHARS = 10, 8, 60_000_000, 300
POLL_S = 0.4
NOTES = (
    "The same frames, seed and noise in every tile; only what you choose below differs. Live streams go first: while "
    "one is running this page waits for its pauses. A clip you upload, and what is made of it, stays on the server "
    "until you leave the page, an hour at most."
)


def build_compare(engine: LiveEngine, preset: Preset) -> gr.Blocks:
    """The page.

    Args:
        engine: does the work.
        preset: its model, for the first values.
    """
    desk = CompareDesk(engine)
    titles = {m.name: m.title for m in list_mechanisms()}
    most = len(preset.schedule.timesteps) or 4
    with gr.Blocks(title="streamdiff compare", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# streamdiff compare\n\n{NOTES} [Back to the live page](..)")
        with gr.Row():
            with gr.Column(min_width=320):
                prompt = gr.Textbox(
                    "comic book panel, flat colours and bold ink", label="Prompt", max_length=MAX_PROMPT_CHARS
                )
                policies = gr.Dropdown(
                    _labelled(POLICIES, titles), value=["sink", "sliding_window"], multiselect=True, label="KV policies"
                )
                schedules = gr.Dropdown(
                    _labelled(SCHEDULES, titles), value=[preset.schedule.kind], multiselect=True, label="Schedules"
                )
                steps = gr.CheckboxGroup(
                    list(range(1, most + 1)), value=[preset.schedule.default_steps], label="Denoising steps"
                )
            with gr.Column(min_width=320):
                clip = gr.Video(label="Clip (none: the bundled sample)", sources=["upload"], height=220)
                seconds = gr.Slider(1, MAX_SECONDS, 3, step=1, label="Seconds of it")
                with gr.Row():
                    start = gr.Button("Compare", variant="primary")
                    cancel = gr.Button("Cancel")
        status = gr.HTML(_say("Choose up to 8 tiles, then press Compare."))
        grid = gr.Video(label="Side by side", autoplay=True, loop=True)
        files = gr.Files(label="Report, figures, recipe", interactive=False)
        chosen = [prompt, policies, schedules, steps, clip, seconds]
        start.click(desk.run, chosen, [status, grid, files], concurrency_limit=4, show_progress="hidden")
        cancel.click(desk.cancel, queue=False)
        page.unload(desk.leave)
    return page


class CompareDesk:
    """Who compares what: at most one comparison per viewer, and the folder of the latest."""

    def __init__(self, engine: LiveEngine) -> None:
        self._engine = engine
        self._work: dict[str, PauseWork] = {}
        self._folders: dict[str, Path] = {}

    def run(
        self,
        prompt: str,
        policies: Sequence[str],
        schedules: Sequence[str],
        steps: Sequence[int],
        clip: str | None,
        seconds: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """(status, grid video, files) as they come; mistakes are said in one sentence."""
        viewer, nothing = request.session_hash, (gr.skip(), gr.skip())
        try:
            vary = choose(prompt, policies, schedules, steps)
            check_clip(clip)
            source, folder = clip or "sample", self._new_folder(viewer)
            work = self._engine.work_in_pauses(PauseWork(lambda p: make(p, source, prompt, vary, seconds, folder)))
        except (ValueError, VideoReadError) as error:
            yield _say(f"{error}.", failed=True), *nothing
            return
        except ServerFullError:
            yield _say("Another comparison is under way; try again in a minute.", failed=True), *nothing
            return
        self._work[viewer] = work
        try:
            yield _say("Waiting for the model."), None, None
            shown = None
            while not work.done.wait(POLL_S):
                if work.progress is not shown:
                    shown = work.progress
                    yield _bar(shown.done / shown.total, shown.what), *nothing
        finally:
            work.cancel()
        if work.result is None:
            words = f"It failed: {work.error}." if work.error else "Cancelled."
            yield _say(words, failed=bool(work.error)), *nothing
            return
        failed = "; ".join(f"{cell.label} failed: {cell.error}" for cell in work.result.failed)
        words = f"{len(work.result.cells)} tiles, {work.result.num_frames} frames each. {failed}"
        made = [str(folder / name) for name in (REPORT_NAME, SCORES_NAME, RECIPE_NAME)]
        yield _say(words, failed=bool(failed)), str(folder / GRID_NAME), made

    def cancel(self, request: gr.Request) -> None:
        """End this viewer's comparison."""
        if (work := self._work.get(request.session_hash)) is not None:
            work.cancel()

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.cancel(request)
        if (work := self._work.pop(request.session_hash, None)) is not None:
            work.done.wait(10)  # a step is under way: nothing may be written after the folder is gone
        self._remove_folder(request.session_hash)

    def _new_folder(self, viewer: str) -> Path:
        """A folder for this comparison; the viewer's last one goes."""
        self._remove_folder(viewer)
        self._folders[viewer] = Path(tempfile.mkdtemp(prefix="streamdiff-compare-")) / "comparison"
        return self._folders[viewer]

    def _remove_folder(self, viewer: str) -> None:
        if (folder := self._folders.pop(viewer, None)) is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)


def choose(prompt: str, policies: Sequence[str], schedules: Sequence[str], steps: Sequence[int]) -> dict[str, list]:
    """What varies, by setting name.

    Raises:
        ValueError: an empty prompt or choice, nothing to compare, or too much.
    """
    if not prompt.strip() or len(prompt) > MAX_PROMPT_CHARS:
        raise ValueError(f"Write a prompt of up to {MAX_PROMPT_CHARS} letters")
    vary = {"policy": list(policies), "schedule": list(schedules), "steps": sorted(int(n) for n in steps)}
    if empty := [name for name, values in vary.items() if not values]:
        raise ValueError(f"Choose at least one {empty[0]}")
    count = len(policies) * len(schedules) * len(steps)
    if not 2 <= count <= MAX_CELLS:
        raise ValueError(f"These are {count} tiles; choose 2 to {MAX_CELLS}")
    return vary


def check_clip(clip: str | None) -> None:
    """Refuse a file that is too large or no video.

    Raises:
        ValueError: too large.
        VideoReadError: not readable.
    """
    if clip and Path(clip).stat().st_size > MAX_UPLOAD_BYTES:
        raise ValueError(f"The clip has more than {MAX_UPLOAD_BYTES // 1_000_000} MB; upload a shorter one")
    if clip:
        probe(clip)


def make(
    pipe: StreamPipeline, source: str, prompt: str, vary: dict[str, list], seconds: float, folder: Path
) -> Iterator[Any]:
    """The steps of a comparison; in the model's thread."""
    several = {name: values for name, values in vary.items() if len(values) > 1}
    fixed = {name: values[0] for name, values in vary.items() if len(values) == 1}
    size = stream_size(probe(source), pipe.preset)
    planned = plan(
        pipe, source, prompt, several, settings=fixed, size=size, max_seconds=min(float(seconds), MAX_SECONDS)
    )
    return (yield from compare(pipe, planned, source, folder))


def _labelled(names: Sequence[str], titles: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{name}: {titles[name]}" if name in titles else name, name) for name in sorted(names)]


def _say(words: str, failed: bool = False) -> str:
    colour = "color:#b3261e;" if failed else ""
    return f'<p role="status" style="margin:.25rem 0;{colour}">{html.escape(words)}</p>'


def _bar(share: float, what: str) -> str:
    look = 'style="width:100%;accent-color:#7c3aed" aria-label="progress"'
    return (
        f'<div role="status"><progress max="1" value="{share:.3f}" {look}></progress>'
        f"<p>{100 * share:.0f} %: {html.escape(what)}</p></div>"
    )
