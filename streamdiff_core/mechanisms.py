"""Every streaming mechanism in one list, read from the code that implements it: ``list_mechanisms()``.

A mechanism is a class whose docstring is laid out like this (sections may be missing, lines of a section are indented):

    One sentence that says what it does.

    The rule, in free text.

    Paper: name of the system and section.
    Training-free: yes | runs, … | no, …
    Cost: relative to the plain sink.
    Look for: what a viewer should see.
    Deviates: from the paper or the released code, and why.

Its knobs are its dataclass fields (each with a docstring line below it), or the keyword-only parameters of its
``__init__``. ``python -m streamdiff_core.mechanisms`` prints ``docs/MECHANISMS.md``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from functools import cache
from typing import Any

from streamdiff_core.config import PRESETS
from streamdiff_core.inputs import INPUTS
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.prompt_fade import PromptFade
from streamdiff_core.schedules import SCHEDULES, knobs_of
from streamdiff_core.stream_options import StreamOptions, check_options

SECTIONS = ("Paper", "Training-free", "Cost", "Look for", "Deviates")

SWITCH_RULES = {"fade": PromptFade}
"""What ``set_prompt(…, on_switch=…)`` can do beyond the KV policy."""

WAITING = {
    "hybrid_forcing": (
        "Linear-attention state of evicted chunks", "Hybrid Forcing (SEEDS §3.16)",
        "its state enters through a projection that starts at zero; waits for the Hybrid Forcing checkpoint",
    ),
    "adastate": (
        "Hidden anchor frame denoised with every chunk", "AdaState (SEEDS §3.16)",
        "the hidden state is trained; no checkpoint was found",
    ),
    "shotstream": (
        "Global + local cache with a temporal phase per shot", "ShotStream (SEEDS §3.16)",
        "dual cache and phase offset are trained in; waits for the ShotStream checkpoint",
    ),
    "svi": (
        "Error-recycling fine-tuning", "Stable Video Infinity (SEEDS §3.16)",
        "there is no rule at inference time; waits for its LoRA on a causal Wan",
    ),
    "sana": (
        "Gated-delta linear blocks", "SANA-Streaming (SEEDS §3.16)",
        "another architecture; waits for a loader of the SANA-Streaming checkpoint",
    ),
    "streamdit": (
        "Moving buffer of frames at rising noise levels", "StreamDiT (SEEDS §4)",
        "trained with its buffer, own 4B model; no checkpoint was found",
    ),
}  # fmt: skip
"""Mechanisms that need weights of their own: title, paper, reason and what they wait for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One setting of a mechanism."""

    name: str
    """Name in ``policy_options``, or the keyword argument."""
    default: Any
    """Value when nothing is said."""
    summary: str
    """First line of its docstring."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """What a reader wants to know about one mechanism."""

    name: str
    """Name in the registry."""
    kind: str
    """``policy``, ``schedule``, ``input`` or ``switch``."""
    title: str
    """One sentence."""
    paper: str
    """Where it comes from."""
    knobs: tuple[Knob, ...] = ()
    """Settings with defaults."""
    training_free: str = ""
    """``yes``, ``runs`` (weights tuned for it do better) or ``no``, with a reason."""
    cost: str = ""
    """Relative to the plain sink."""
    look_for: str = ""
    """What a viewer should see."""
    deviates: str = ""
    """From the paper or the released code."""
    is_available: bool = True
    """False where it waits for weights of its own."""


@cache
def list_mechanisms() -> tuple[Mechanism, ...]:
    """All mechanisms: policies, schedules, input side, and those that wait for weights. Sources are read once."""
    registries = (("policy", POLICIES), ("schedule", SCHEDULES), ("input", INPUTS), ("switch", SWITCH_RULES))
    found = [describe(name, kind, cls) for kind, known in registries for name, cls in sorted(known.items())]
    waiting = [
        Mechanism(
            name=name, kind="schedule" if name == "streamdit" else "policy", title=title, paper=paper,
            training_free=f"no: {reason}", is_available=False,
        )
        for name, (title, paper, reason) in WAITING.items()
    ]  # fmt: skip
    return tuple(found + waiting)


def describe(name: str, kind: str, cls: type) -> Mechanism:
    """One mechanism from its class."""
    title, sections = read_docstring(cls)
    return Mechanism(
        name=name, kind=kind, title=title, knobs=read_knobs(cls), paper=sections.get("Paper", ""),
        training_free=sections.get("Training-free", ""), cost=sections.get("Cost", ""),
        look_for=sections.get("Look for", ""), deviates=sections.get("Deviates", ""),
    )  # fmt: skip


def read_docstring(cls: type) -> tuple[str, dict[str, str]]:
    """First paragraph in one line, and the text of each section."""
    text = inspect.getdoc(cls) or ""
    title = " ".join(text.split("\n\n")[0].split())
    pattern = rf"^({'|'.join(SECTIONS)}): (.*(?:\n[ \t]+.*)*)"
    return title, {name: " ".join(body.split()) for name, body in re.findall(pattern, text, flags=re.M)}


def read_knobs(cls: type) -> tuple[Knob, ...]:
    """Dataclass fields (the cache configuration is not one), else keyword-only parameters with a default."""
    if not dataclasses.is_dataclass(cls):
        parameters = inspect.signature(cls).parameters.values()
        found = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    else:
        found = [(f.name, _default(f)) for f in dataclasses.fields(cls) if f.name != "config" and _has_default(f)]
    summaries: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        summaries |= _field_docstrings(base)
    return tuple(Knob(name=name, default=default, summary=summaries.get(name, "")) for name, default in found)


def _has_default(f: dataclasses.Field) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string literal below each annotated field, in one line."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    found = {}
    for line, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_text:
            found[line.target.id] = " ".join(str(below.value.value).split())
    return found


def all_pairs() -> list[tuple[str, str, bool]]:
    """Every (policy, schedule, clean pass); the pass only where the schedule has it to switch."""
    return [
        (policy, schedule, clean_pass)
        for policy in sorted(POLICIES)
        for schedule in sorted(SCHEDULES)
        for clean_pass in (False, True)[: 1 + ("clean_pass" in knobs_of(SCHEDULES[schedule]))]
    ]


def refused_pairs(preset: str = "tiny", **options: Any) -> dict[str, list[tuple[str, str, bool]]]:
    """Pairs that a stream with the preset's cache does not start with, by what it says.

    Args:
        options: fields of ``StreamOptions``, such as ``steps``.
    """
    found: dict[str, list[tuple[str, str, bool]]] = {}
    p = PRESETS[preset]
    for pair in all_pairs():
        policy, schedule, clean_pass = pair
        shared = dict(cache=p.cache, width=p.width, height=p.height) | options
        try:
            check_options(StreamOptions(policy=policy, schedule=schedule, clean_pass=clean_pass, **shared), p)
        except ValueError as refusal:
            found.setdefault(str(refusal), []).append(pair)
    return found


def as_markdown() -> str:
    """``docs/MECHANISMS.md``."""
    titles = {
        "policy": "KV policies: what attention may read",
        "schedule": "Schedules: which forwards, in which order",
        "input": "Input side",
        "switch": "Prompt switches",
    }
    mechanisms = list_mechanisms()
    lines = [
        "# Mechanisms",
        "",
        "Generated by `python -m streamdiff_core.mechanisms > docs/MECHANISMS.md` from the docstrings; do not edit.",
        "SEEDS numbers are sections of the project's notes on the published systems.",
        "Measured costs: [benchmarks/results](../benchmarks/results), the files named `mechanisms_*`.",
    ]
    for kind, heading in titles.items():
        available = [m for m in mechanisms if m.kind == kind and m.is_available]
        if available:
            lines += ["", f"## {heading}", "", "| name | what it does | training-free | cost |", "|---|---|---|---|"]
            lines += [f"| [`{m.name}`](#{m.name}) | {m.title} | {m.training_free} | {m.cost} |" for m in available]
            lines += [line for m in available for line in _entry(m)]
    lines += _pairs()
    lines += [
        "",
        "## Waiting for weights of their own",
        "",
        "| name | what it does | paper | reason |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{m.name}` | {m.title} | {m.paper} | {m.training_free.removeprefix('no: ')} |"
        for m in mechanisms
        if not m.is_available
    ]
    return "\n".join(lines) + "\n"


def _pairs() -> list[str]:
    cache, total = PRESETS["tiny"].cache, len(all_pairs())
    lines = [
        "",
        "## Every policy under every schedule",
        "",
        f"{total} pairs, with and without clean pass where there is one to switch. With the cache of `tiny` "
        f"({cache.sink_frames} sink + {cache.window_frames} window frames,",
        "chunks of 1) these are refused, with the sentence as it stands; all others stream.",
        "",
        "| steps | refused | which | why |",
        "|---|---|---|---|",
    ]
    for steps in (1, 2, 4):
        for reason, pairs in refused_pairs(steps=steps).items():
            policies, schedules = ({pair[i] for pair in pairs} for i in (0, 1))
            who = "every policy" if policies == set(POLICIES) else ", ".join(f"`{p}`" for p in sorted(policies))
            lines.append(
                f"| {steps} | {len(pairs)} | {who} × {', '.join(f'`{s}`' for s in sorted(schedules))} | {reason} |"
            )
    return lines


def _entry(m: Mechanism) -> list[str]:
    facts = {"Paper": m.paper, "Look for": m.look_for, "Deviates": m.deviates}
    lines = ["", f"### {m.name}", "", m.title]
    lines += [""] if any(facts.values()) else []
    lines += [f"- **{what}**: {text}" for what, text in facts.items() if text]
    if m.knobs:
        lines += ["", "| knob | default | meaning |", "|---|---|---|"]
        lines += [f"| `{k.name}` | `{k.default!r}` | {k.summary} |" for k in m.knobs]
    return lines


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
