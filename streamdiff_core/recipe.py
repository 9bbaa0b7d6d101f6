"""A recipe: everything that makes an output again, bit for bit on the same kind of machine, as one JSON object.

Which model (preset and hash of the numbers as loaded), which input (name and hash), which options and prompt, and what
was changed while the stream ran, by the frame before which it took effect. Reading is strict: an unknown, missing or
unfit field is refused in one sentence. Files that hold recipes are `recipe_files`; making the output is `restyle`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from streamdiff_core import __version__
from streamdiff_core.config import Preset, get_preset
from streamdiff_core.plain_data import check_fields, from_plain
from streamdiff_core.stream_options import SWITCHES, Prompt, StreamOptions, change_options, check_options

if TYPE_CHECKING:
    from streamdiff_core.pipeline import StreamPipeline
    from streamdiff_core.session import StreamSession

FORMAT = 1
"""Version of the fields below; another one is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEvent:
    """A new prompt while the stream ran."""

    frame: int
    """Input frame before which it took effect."""
    prompt: Prompt
    """Text, or {text: weight}."""
    on_switch: str = "keep"
    """As in ``StreamSession.set_prompt``."""

    def apply(self, session: StreamSession) -> None:
        """Do it again."""
        session.set_prompt(self.prompt, self.on_switch)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionEvent:
    """Changed options while the stream ran."""

    frame: int
    """Input frame before which they took effect."""
    options: Mapping[str, Any]
    """As in ``StreamSession.set_options``, plain values."""

    def apply(self, session: StreamSession) -> None:
        """Do it again."""
        session.set_options(**self.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to run, on what, and how."""

    format: int = FORMAT
    """Version of this list of fields."""
    streamdiff: str = __version__
    """Version of the library."""
    preset: str
    """Name of the preset."""
    model_sha256: str
    """``StreamPipeline.model_sha256``: the weights as they were loaded."""
    input: str
    """File or folder name without its path, or ``sample``."""
    input_sha256: str
    """Of its content (``recipe_files.hash_input``)."""
    resampled: bool
    """Whether the input was resampled to ``fps``; otherwise each stored frame is one frame."""
    fps: float
    """Frames per second of the output."""
    num_frames: int
    """Frames taken from the input, and made."""
    prompt: Prompt
    """Prompt at the start."""
    options: StreamOptions
    """Options at the start, size included."""
    events: tuple[PromptEvent | OptionEvent, ...] = ()
    """What changed on the way, in order."""
    side_by_side: bool = False
    """Whether the output shows the input beside the result."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.format != FORMAT:
            raise ValueError(
                f"recipe.format {self.format} is not the {FORMAT} that this version reads; update streamdiff"
            )
        get_preset(self.preset)
        if not self.fps > 0 or self.num_frames < 1:
            raise ValueError(f"recipe.fps {self.fps} must be above 0 and num_frames {self.num_frames} at least 1")
        frames = [event.frame for event in self.events]
        if frames != sorted(frames) or min(frames, default=0) < 0:
            raise ValueError(f"recipe.events must be in the order of their frames, from 0 on, got {frames}")

    def check(self, preset: Preset) -> None:
        """Refuse options, now or in an event, that cannot work, before anything is computed.

        Raises:
            ValueError: the text names the event.
        """
        check_options(self.options, preset)
        options = self.options
        for number, event in enumerate(self.events):
            try:
                if isinstance(event, OptionEvent):
                    options = change_options(options, event.options, preset)
                elif event.on_switch not in SWITCHES:
                    raise ValueError(f"unknown on_switch {event.on_switch!r}; use one of {', '.join(SWITCHES)}")
            except ValueError as error:
                raise ValueError(f"recipe.events[{number}]: {error}") from error

    def differences(self, pipe: StreamPipeline) -> str | None:
        """One line about what may keep ``pipe`` from making the same pixels; None when nothing is known to."""
        found = []
        if self.streamdiff != __version__:
            found.append(f"streamdiff {self.streamdiff} (this is {__version__})")
        if self.model_sha256 != pipe.model_sha256:
            found.append(f"weights {self.model_sha256[:8]}… (these are {pipe.model_sha256[:8]}…; dtype and LoRA count)")
        return f"the recipe was made with {' and '.join(found)}: the output may differ" if found else None

    def to_json(self, indent: int | None = 1) -> str:
        """The recipe as JSON text; ``from_json`` gives an equal one back."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False, default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read ``to_json``'s text, strictly.

        Raises:
            ValueError: no JSON, or a field that is unknown, missing or unfit.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the recipe is no JSON ({error}); save it again from where it was made") from error
        if isinstance(values, dict) and "base" in values:
            raise ValueError("this is the recipe of a comparison; make it again with: streamdiff compare --recipe")
        if isinstance(values, dict) and isinstance(values.get("events"), list):
            values = values | {"events": [_event(f"recipe.events[{i}]", e) for i, e in enumerate(values["events"])]}
        return from_plain(cls, values, "recipe")


def prompt_events(prompts: Sequence[tuple[float, str]], fps: float, on_switch: str) -> tuple[PromptEvent, ...]:
    """Prompts by time, (seconds, prompt), as events: each before the first frame that is not earlier."""
    frames = [
        (next(i for i in range(int(s * fps), int(s * fps) + 3) if i / fps >= s - 1e-9), p) for s, p in sorted(prompts)
    ]
    return tuple(PromptEvent(frame=frame, prompt=prompt, on_switch=on_switch) for frame, prompt in frames)


def _event(what: str, values: Any) -> PromptEvent | OptionEvent:
    is_option = isinstance(values, Mapping) and "options" in values
    return from_plain(OptionEvent if is_option else PromptEvent, values, what)


def _plain(value: Any) -> Any:
    """NumPy scalars and mappings other than dict, for ``json``."""
    return dict(value) if isinstance(value, Mapping) else value.item()
