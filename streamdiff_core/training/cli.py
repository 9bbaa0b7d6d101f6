"""``streamdiff-train``: the bundled model from a folder of clips, stage by stage, each resumable.

    streamdiff-train all --clips clips/train --val clips/val --work training_run --minutes 95
    streamdiff-train export --work training_run --out streamdiff_core/assets/tiny

A stage that has used up its minutes is skipped; raise ``--minutes`` to train on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from streamdiff_core.config import get_preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.guided_filter import GuidedFilter
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.types import CheckpointError, VideoReadError
from streamdiff_core.vae import TinyVAE
from streamdiff_core.weights import hash_weights, load_checkpoint, save_checkpoint

STAGES = ("text", "prepare", "decoder", "dit", "refine", "export", "guide", "ranges", "evaluate")
PRESET = "tiny"
RANGE_FRAMES = 25
PAIRS_PER_CLIP = 6
NEEDED_CLIPS = {stage: ("clips", "val") for stage in ("prepare", "decoder", "refine", "guide", "all")} | {
    "evaluate": ("val",)
}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="streamdiff-train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "stage",
        choices=(*STAGES, "all", "unpack"),
        help="what to do; 'all' does everything in order, 'unpack' makes checkpoints to train on from weights in OUT",
    )
    parser.add_argument("--work", type=Path, default=Path("training_run"), help="latents and checkpoints")
    parser.add_argument("--clips", type=Path, help="folder of training clips (.mp4, 32 frames or more each)")
    parser.add_argument("--val", type=Path, help="folder of validation clips")
    parser.add_argument("--out", type=Path, help="folder for the exported weights (default: WORK/export)")
    parser.add_argument("--minutes", type=float, default=95, help="budget of the transformer")
    parser.add_argument("--decoder-minutes", type=float, default=45, help="budget of the VAE decoder")
    parser.add_argument("--refine-minutes", type=float, default=25, help="budget of the decoder's refinement")
    parser.add_argument("--guide-minutes", type=float, default=30, help="budget of the guided filter")
    parser.add_argument("--variants", type=int, default=3, help="versions of each clip, the first unchanged")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out = args.out or args.work / "export"
    for name in NEEDED_CLIPS.get(args.stage, ()):
        folder = getattr(args, name)
        if folder is None or not any(folder.glob("*.mp4")):
            return _fail(f"--{name} must be a folder with .mp4 clips, got {folder}", 2)
    try:
        for stage in STAGES if args.stage == "all" else (args.stage,):
            globals()[f"run_{stage}"](args)
    except FileNotFoundError as error:
        return _fail(f"{error.filename} is missing; run the earlier stages first", 1)
    except (CheckpointError, VideoReadError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from here", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"streamdiff-train: {message}", file=sys.stderr)
    return code


def run_text(args: argparse.Namespace) -> None:
    """Train the text encoder."""
    from streamdiff_core.training.text_stage import train_text

    train_text(args.work / "text", get_preset(PRESET).text, seed=args.seed)


def run_prepare(args: argparse.Namespace) -> None:
    """Fit the VAE's basis and encode all clips in all styles."""
    from streamdiff_core.training.data import prepare
    from streamdiff_core.training.runs import atomic_save
    from streamdiff_core.training.vae_basis import fit_basis

    basis = args.work / "vae_basis.pt"
    if not basis.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        atomic_save(fit_basis(args.clips, get_preset(PRESET).vae, seed=args.seed).state_dict(), basis)
    vae = _basis_vae(args)
    prepare(args.clips, args.work / "latents", vae, range(args.variants), num_workers=args.threads)
    prepare(args.val, args.work / "val_latents", vae, (0,), num_workers=args.threads)


def run_decoder(args: argparse.Namespace) -> None:
    """Train the VAE's residual decoder."""
    from streamdiff_core.training.vae_stage import train_decoder

    train_decoder(
        args.work / "decoder",
        _basis_vae(args),
        args.clips,
        args.val,
        minutes=args.decoder_minutes,
        seed=args.seed,
    )


def run_dit(args: argparse.Namespace) -> None:
    """Train the transformer."""
    from streamdiff_core.training.dit_stage import train_dit

    train_dit(
        args.work / "dit",
        get_preset(PRESET).model,
        _basis_vae(args),
        _text_encoder(args),
        args.work / "latents",
        args.work / "val_latents",
        minutes=args.minutes,
        seed=args.seed,
    )


def run_refine(args: argparse.Namespace) -> None:
    """Fine-tune the decoder on the transformer's latents."""
    from streamdiff_core.training.refine_stage import Restyler
    from streamdiff_core.training.vae_stage import train_decoder

    vae = TinyVAE(get_preset(PRESET).vae)
    vae.load_state_dict(_checkpoint(args.work / "decoder")["average"]["shadow"])
    transformer = CausalWanTransformer(get_preset(PRESET).model)
    transformer.load_state_dict(_checkpoint(args.work / "dit")["average"]["shadow"])
    restyler = Restyler(transformer, _text_encoder(args), args.seed)
    train_decoder(
        args.work / "refine", vae, args.clips, args.val, minutes=args.refine_minutes,
        loss_of=restyler.loss, peak_lr=6e-4, seed=args.seed + 1,
    )  # fmt: skip


def run_export(args: argparse.Namespace) -> None:
    """Averaged weights -> safetensors: transformer in bfloat16, the small rest in float32.

    A guided filter that was not trained yet is exported as it begins: it changes nothing.
    """
    dit = _checkpoint(args.work / "dit")
    transformer = CausalWanTransformer(get_preset(PRESET).model)
    transformer.load_state_dict(dit["average"]["shadow"])
    vae = TinyVAE(get_preset(PRESET).vae)
    vae.load_state_dict(_checkpoint(args.work / "refine")["average"]["shadow"])
    if (args.work / "guide" / "last.pt").exists():
        vae.guide.load_state_dict(_checkpoint(args.work / "guide")["average"]["shadow"])
    details = {"steps": str(dit["step"]), "minutes": f"{dit['seconds'] / 60:.0f}"}
    save_checkpoint(transformer, args.out / "transformer.safetensors", dtype=torch.bfloat16, metadata=details)
    save_checkpoint(vae, args.out / "vae.safetensors", metadata={})
    save_checkpoint(_text_encoder(args), args.out / "text_encoder.safetensors", metadata={})
    for run in ("dit", "decoder", "refine", "text"):
        shutil.copy(args.work / run / "metrics.csv", args.out / f"{run}_metrics.csv")


def run_guide(args: argparse.Namespace) -> None:
    """Let the exported model restyle all clips, train its guided filter on them, and export that as well."""
    from streamdiff_core.pipeline import StreamPipeline
    from streamdiff_core.training.guide_stage import make_pairs, train_guide

    pipe = StreamPipeline.from_preset(PRESET, weights=args.out, device="cpu")
    name = hash_weights((pipe.transformer, pipe.vae.blocks))[:8]  # pairs of another model would teach its faults
    pairs, val_pairs = (args.work / f"{kind}_{name}" for kind in ("pairs", "val_pairs"))
    for clips, folder in ((args.clips, pairs), (args.val, val_pairs)):
        make_pairs(pipe, clips, folder, PAIRS_PER_CLIP, seed=args.seed)
    torch.manual_seed(args.seed)
    guide = GuidedFilter(get_preset(PRESET).vae.guide_width)
    train_guide(args.work / "guide", guide, pairs, val_pairs, minutes=args.guide_minutes, seed=args.seed)
    vae = TinyVAE(get_preset(PRESET).vae)
    load_checkpoint(vae, args.out / "vae.safetensors")
    vae.guide.load_state_dict(_checkpoint(args.work / "guide")["average"]["shadow"])
    save_checkpoint(vae, args.out / "vae.safetensors", metadata={})
    shutil.copy(args.work / "guide" / "metrics.csv", args.out / "guide_metrics.csv")


def run_ranges(args: argparse.Namespace) -> None:
    """Watch the exported model restyle the sample clip in every style: the ranges of its 8-bit activations."""
    from streamdiff_core.int8_blocks import RANGES_FILE, measure_ranges
    from streamdiff_core.pipeline import StreamPipeline
    from streamdiff_core.training.prompts import DEFAULT_PROMPTS
    from streamdiff_core.video_io import read_video

    pipe = StreamPipeline.from_preset(PRESET, weights=args.out, dtype="float32", device="cpu")
    frames = np.stack(list(read_video("sample", max_seconds=2)))[:RANGE_FRAMES]
    with measure_ranges(pipe.transformer) as ranges:
        for prompt in DEFAULT_PROMPTS.values():
            with pipe.start(prompt, seed=args.seed) as session:
                session.push(frames)
                session.flush()
    rounded = [[[float(f"{x:.4g}") for x in span] for span in block] for block in ranges]
    (args.out / RANGES_FILE).write_text(json.dumps(rounded) + "\n", encoding="utf-8")


def run_unpack(args: argparse.Namespace) -> None:
    """Inverse of export: checkpoints in WORK with the weights in OUT, fresh optimisers and no time spent."""
    from streamdiff_core.training.data import STYLE_NAMES
    from streamdiff_core.training.runs import Average, Run, atomic_save

    preset = get_preset(PRESET)
    transformer, vae, text = CausalWanTransformer(preset.model), TinyVAE(preset.vae), TinyTextEncoder(preset.text)
    for module, file in ((transformer, "transformer"), (vae, "vae"), (text, "text_encoder")):
        load_checkpoint(module, args.out / f"{file}.safetensors")
    decoder = [*vae.stem.parameters(), *vae.blocks.parameters(), *vae.detail.parameters()]
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.01)  # as the stages make it
    for name, part, module, parameters in (
        ("dit", "model", transformer, transformer.parameters()),
        ("decoder", "vae", vae, decoder),
        ("refine", "vae", vae, decoder),
        ("guide", "guide", vae.guide, vae.guide.parameters()),
    ):
        if (args.work / name / "last.pt").exists():
            raise CheckpointError(f"{args.work / name} holds a checkpoint already; choose another --work")
        parts = {part: module, "average": Average(module, 0.999), "optimizer": adam(parameters)}
        Run(args.work / name, **parts).save()
    readout = torch.nn.Linear(preset.text.dim, len(STYLE_NAMES))
    optimizer = torch.optim.AdamW([*text.parameters(), *readout.parameters()])
    Run(args.work / "text", encoder=text, readout=readout, optimizer=optimizer).save()
    atomic_save(vae.state_dict(), args.work / "vae_basis.pt")


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure the exported model on the validation clips."""
    from streamdiff_core.pipeline import StreamPipeline
    from streamdiff_core.training.evaluate import evaluate

    pipe = StreamPipeline.from_preset(PRESET, weights=args.out)
    result = evaluate(pipe, args.val, args.out / "evaluation.json")
    print(json.dumps({key: result[key] for key in result if key != "styles"}, indent=1))


def _checkpoint(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def _basis_vae(args: argparse.Namespace) -> TinyVAE:
    torch.manual_seed(args.seed)
    vae = TinyVAE(get_preset(PRESET).vae)
    basis = torch.load(args.work / "vae_basis.pt", weights_only=True)
    vae.load_state_dict({**vae.state_dict(), **{name: basis[name] for name in ("basis", "mean", "scale")}})
    return vae


def _text_encoder(args: argparse.Namespace) -> TinyTextEncoder:
    encoder = TinyTextEncoder(get_preset(PRESET).text)
    encoder.load_state_dict(_checkpoint(args.work / "text")["encoder"])
    return encoder.eval()
