"""Input-side rules alone: what they hold back, by hand, and which options are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamdiff_core.inputs import INPUTS, HeldFrames, InputRule, input_rule, make_inputs
from streamdiff_core.inputs.freeze import Freeze, largest_change
from streamdiff_core.inputs.rcfg import ResidualGuidance
from streamdiff_core.inputs.similarity_filter import SimilarityFilter, min_cosine
from streamdiff_core.types import RowOp


def picture(value, size=32):
    return np.full((size, size, 3), value, np.uint8)


def chunk(*values):
    return np.stack([picture(v) for v in values])


def asked(rule, *chunks):
    """What a rule says to each chunk, taking those it does not hold back."""
    said = []
    for frames in chunks:
        said.append(rule.holds(frames))
        if not said[-1]:
            rule.takes(frames)
    return said


# --- freeze -------------------------------------------------------------------------------------------------


def test_freeze_by_hand():
    """Two still chunks settle, later ones are held; movement within a chunk or since the last processed one counts."""
    rule = Freeze(tolerance_levels=3, settle_chunks=2)
    chunks = [chunk(9, 9), chunk(9, 9), chunk(9, 12), chunk(12, 12), chunk(14, 14), chunk(16, 16), chunk(16, 16)]
    # still against          -           9           9            12            12: +2       12: +4 moves   16
    assert asked(rule, *chunks) == [False, False, False, True, True, False, False]
    assert asked(Freeze(tolerance_levels=0, settle_chunks=0), chunk(5), chunk(5), chunk(6)) == [False, True, False]


def test_a_small_thing_that_moves_is_seen():
    """One block of 16 x 16 changes by 40: RMS 5 over the picture, 40 in its block; also in a cut block at the edge."""
    frames = chunk(9, 9)
    frames[1, 16:, :16] = 49
    assert largest_change(frames, picture(9)) == pytest.approx(40)
    edge = np.stack([picture(9, 24)])
    edge[0, 16:, 16:] = 19
    assert largest_change(edge, picture(9, 24)) == pytest.approx(10)


# --- similarity ---------------------------------------------------------------------------------------------


def two_pictures(cosine):
    """Pictures in [-1, 1] with a given cosine: k of 32 rows have the opposite sign, cosine = 1 - 2 k / 32."""
    a, b = picture(255), picture(255)
    b[: round((1 - cosine) * 16)] = 0
    return a, b


def test_cosine_by_hand():
    a, b = two_pictures(0.75)
    assert min_cosine(np.stack([a, b, a]), a) == pytest.approx(0.75)
    assert min_cosine(np.stack([a]), a) == pytest.approx(1)
    assert min_cosine(np.stack([picture(0)]), a) == pytest.approx(-1)


@pytest.mark.parametrize(
    "cosine, threshold, share", [(1.0, 0.98, 1.0), (0.75, 0.5, 0.5), (0.875, 0.5, 0.75), (0.5, 0.5, 0)]
)
def test_how_often_a_chunk_is_held(cosine, threshold, share):
    """p = max(0, 1 - (1 - cosine) / (1 - threshold)), over 600 seeds: 6 sigma are 0.12."""
    a, b = two_pictures(cosine)
    count = 0
    for seed in range(600):
        rule = SimilarityFilter(threshold=threshold)
        rule.begin(seed, None)
        count += asked(rule, a[None], b[None])[1]
    assert abs(count / 600 - share) <= (0.12 if 0 < share < 1 else 0)


def test_at_most_so_many_in_a_row():
    still = [chunk(9)] * 9
    assert asked(SimilarityFilter(max_held_chunks=3), *still) == [False, True, True, True] * 2 + [False]


def test_draws_belong_to_seed_and_chunk():
    a, b = two_pictures(0.75)

    def draws(seed):
        rule = SimilarityFilter(threshold=0.5)
        rule.begin(seed, None)
        return asked(rule, *([a[None], b[None]] * 40))

    assert draws(1) == draws(1) != draws(2)
    assert True in draws(1)[1:] and draws(1)[1::2].count(False) > 5  # chance falls per chunk, not once per stream


# --- guidance -----------------------------------------------------------------------------------------------


def row(xt, frame_ids=(0,), prompt="positive", sigma=0.5, kind="denoise"):
    return RowOp(
        xt=torch.full((len(frame_ids), 1, 1, 1), xt), sigma=sigma, timestep=500.0, frame_ids=frame_ids, cache_row=0,
        chunk_idx=0, step=0, prompt=prompt, kind=kind,
    )  # fmt: skip


def guide(rule, rows, sources, answers):
    """Outputs of ``predict`` as numbers, and the prompts of every forward."""
    calls = []

    def forward(rows):
        calls.append([r.prompt for r in rows])
        return [torch.full_like(r.xt, answers[r.prompt]) for r in rows]

    sources = {frame: torch.full((1, 1, 1), x) for frame, x in sources.items()}
    return [x.flatten().tolist() for x in rule.predict(rows, sources, forward)], calls


def test_self_guidance_by_hand():
    """v = δ v_res + γ (v - δ v_res) with x 4, z 1, x0 2, σ ½: v_res 6, v 4.

    δ = 1, γ = 1.5: v = 6 + 1.5 · (-2) = 3, x0 = 4 - ½ · 3 = 2.5 = z + γ (x0 - z). δ = ½: v = 3 + 1.5 = 4.5, x0 1.75.
    """
    for delta, expected in ((1.0, 2.5), (0.5, 1.75)):
        rule = ResidualGuidance(scale=1.5, delta=delta)
        out, calls = guide(rule, [row(4.0)], {0: 1.0}, {"positive": 2.0})
        assert out == [[pytest.approx(expected)]] and calls == [["positive"]]


def test_each_frame_has_its_own_source_and_a_clean_pass_is_left_alone():
    rows = [row(4.0, (0, 1)), row(4.0, (0, 1), kind="clean"), row(4.0, (2,))]
    out, _ = guide(ResidualGuidance(scale=2.0), rows, {0: 1.0, 1: 0.0, 2: 5.0}, {"positive": 2.0})
    assert out == [[3.0, 4.0], [2.0, 2.0], [-1.0]]


def test_one_negative_forward_per_chunk():
    """The first look is kept for later steps and for other candidates, and forgotten when the frame has left."""
    rule = ResidualGuidance(kind="one_time", scale=2.0)
    rule.begin(0, lambda prompt: "negative")
    answers = {"positive": 2.0, "negative": 1.0}
    sources = {0: 0.0, 1: 0.0}
    assert guide(rule, [row(4.0), row(9.0)], sources, answers) == ([[3.0], [3.0]], [["negative"], ["positive"] * 2])
    assert guide(rule, [row(4.0)], sources, answers | {"negative": 7.0}) == ([[3.0]], [["positive"]])
    out, calls = guide(rule, [row(4.0, (0, 1))], sources, {"positive": 2.0, "negative": 0.0})
    assert (out, calls) == ([[3.0, 4.0]], [["negative"], ["positive"]])  # frame 0 keeps its first look
    guide(rule, [row(4.0, (1,))], {1: 0.0}, answers)
    assert set(rule._points) == {1}


def test_full_guidance_asks_at_every_step():
    rule = ResidualGuidance(kind="full", scale=2.0)
    rule.begin(0, lambda prompt: "negative")
    for negative, expected in ((1.0, 3.0), (0.0, 4.0)):
        out, calls = guide(rule, [row(4.0)], {0: 9.0}, {"positive": 2.0, "negative": negative})
        assert (out, calls) == ([[expected]], [["negative"], ["positive"]])


# --- held chunks and the registry ---------------------------------------------------------------------------


def test_held_frames_keep_their_place():
    """Chunks 0, 1, a held one behind 1, 2, a held one behind 2; chunk 1 leaves late."""
    held = HeldFrames()
    held.after(0, chunk(1, 2))
    held.add(1, 3)
    held.add(2, 1)
    assert held.due() == [] and held.num_held == 4
    first = held.after(1, chunk(3, 4))
    assert [x[:, 0, 0, 0].tolist() for x in first] == [[3, 4], [4, 4, 4]]
    assert [x[:, 0, 0, 0].tolist() for x in held.after(2, chunk(5))] == [[5], [5]]
    held.add(2, 2)
    assert [x[:, 0, 0, 0].tolist() for x in held.due()] == [[5, 5]] and held.due() == []


def test_files_are_the_registry():
    assert sorted(INPUTS) == ["freeze", "rcfg", "similarity_filter", "warmup"]


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setattr("streamdiff_core.inputs._rule.INPUTS", INPUTS.copy())

    @input_rule("never")
    class Never(InputRule):
        """Holds everything back."""

        def holds(self, frames):
            return True

    stage = make_inputs({"never": {}, "freeze": {}})
    assert stage.holds(chunk(1), must_run=False) and not stage.holds(chunk(1), must_run=True)
    with pytest.raises(ValueError, match="there is an input rule 'never' already"):
        input_rule("never")(type("Other", (InputRule,), {}))


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(blur={}), "unknown input rule 'blur'; known: freeze, rcfg, similarity_filter, warmup"),
        (dict(freeze=True), r"input_options\['freeze'\] must map knobs to values, got True; {} means defaults"),
        (dict(freeze=dict(seconds=1)), "'freeze' has no knob 'seconds'; it has: tolerance_levels, settle_chunks"),
        (dict(freeze=dict(settle_chunks=1.5)), "freeze knob 'settle_chunks' takes values like 2, got 1.5"),
        (dict(freeze=dict(tolerance_levels=True)), "takes values like 6.0, got True"),
        (dict(freeze=dict(tolerance_levels=-1)), "freeze needs tolerance_levels >= 0"),
        (dict(similarity_filter=dict(threshold=1)), "needs -1 <= threshold < 1"),
        (dict(similarity_filter=dict(max_held_chunks=0)), "max_held_chunks >= 1"),
        (dict(warmup=dict(latent_frames=0)), "warmup needs latent_frames >= 1"),
        (dict(rcfg=dict(kind="twice")), "rcfg kind must be one of self, one_time, full, got 'twice'"),
        (dict(rcfg=dict(scale=0.9)), r"scale in \[1, 3\]"),
        (dict(rcfg=dict(delta=1.1)), r"delta in \[0, 1\]"),
    ],
)
def test_unusable_options(options, says):
    with pytest.raises(ValueError, match=says):
        make_inputs(options)


@pytest.mark.parametrize("name, knobs", [("freeze", {}), ("similarity_filter", {}), ("rcfg", dict(kind="self"))])
def test_rules_that_need_an_input_video(name, knobs):
    make_inputs({name: knobs})
    with pytest.raises(ValueError, match=f"input rule '{name}' works on an input video; a text-to-video stream has"):
        make_inputs({name: knobs}, has_frames=False)


def test_rules_that_need_none():
    make_inputs(dict(rcfg=dict(kind="one_time"), warmup={}), has_frames=False)


def test_two_guides(monkeypatch):
    monkeypatch.setitem(INPUTS, "other", type("Other", (InputRule,), dict(guides=True)))
    with pytest.raises(ValueError, match="only one input rule can guide predictions, got rcfg, other"):
        make_inputs(dict(rcfg={}, other={}))
