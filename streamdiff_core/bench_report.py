"""A benchmark's figures as text: Markdown for ``benchmarks/results``, a few lines for the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def to_markdown(result: dict[str, Any]) -> str:
    """The whole report; ``result`` comes from ``bench.run_benchmark``."""
    machine, runs, peaks = result["machine"], result["runs"], result["gemm_peak_flops_per_s"]
    used = (
        ("hardware", machine["hardware"]),
        ("date", result["date"]),
        ("commit", result["commit"] or "unknown (not a git checkout)"),
        (
            "versions",
            f"streamdiff {machine['streamdiff']}, Python {machine['python']}, PyTorch {machine['torch']}",
        ),
        ("threads", machine["torch_threads"]),
        ("CPU has bf16", "yes" if machine["cpu_has_bf16"] else "no"),
        ("C++ kernels", "yes" if machine.get("cpu_kernels") else "no"),
        ("preset, size", f"{result['preset']}{_shrunken(result)}, {result['width']}×{result['height']}"),
        (
            "number type",
            f"{result['dtype']}{_rounded(result)} on {result['device']}{', torch.compile' * result['compiled']}"
            f"{', CUDA graphs' * result['cuda_graphs']}{', stages overlap' * result['overlap_stages']}",
        ),
        ("weights, input", f"{result['weights']}, {result['source']}"),
        ("GEMM peak in this run", ", ".join(f"{name} {_tera(peak)}" for name, peak in peaks.items())),
        ("load", f"{result['load_s']:.2f} s"),
        ("peak memory", _memory(result)),
    )
    rows = [(label, *(cell(run) for run in runs)) for label, cell in ROWS]
    if any("paper_fps" in run or "predicted_fps" in run for run in runs):
        rows += [("the paper's frames per second", *(_paper(run) for run in runs)),
                 ("roofline prediction for this machine", *(_predicted(run) for run in runs))]  # fmt: skip
    rows += [
        (f"{label} against the {name} peak", *(f"{run[key][name]:.1%}" for run in runs))
        for label, key in (("MFU, whole loop", "mfu_by_peak"), ("MFU, transformer", "dit_mfu_by_peak"))
        for name in peaks
    ]
    heads = [f"{run['steps']} step{'s' if run['steps'] > 1 else ''}, {run['schedule']}" for run in runs]
    return "\n".join(
        [
            f"# {result['preset']}{_shrunken(result)} on {machine['hardware']}",
            "",
            _table(("", ""), used),
            "",
            _table(("", *heads), rows),
            "",
            "- Frames per second: pixel frames, from frames in memory to frames in memory, warm stream.",
            "- First frame: from the start of the first stream, prompt included, model loaded, to the frame.",
            "- FLOPs: products and convolutions incl. attention, 2 per multiply-add, counted while one "
            "chunk of a warm stream (4 frames) goes through.",
            "- MFU: FLOP per second / fastest matrix product of this number type measured in the same run.",
            "- float32 eager: the same model, rows and cache without fused q/k/v, with the prompt's keys and "
            "values and the temporal rotation of all cached keys computed in every forward; both run in "
            "turn, median of the ratios of neighbours.",
            "",
            *_predictions(result),
        ]
    )


def _predictions(result: dict[str, Any]) -> list[str]:
    """The full size on other machines, beside the paper; nothing for a preset without counts."""
    if not result["predictions"]:
        return []
    steps = [f"{run['steps']} step{'s' * (run['steps'] > 1)}" for run in result["runs"]]
    rows = []
    for row in result["predictions"]:
        pairs = zip(row["fps"], row["paper_fps"], strict=True)
        cells = (f"{fps:.1f}" + (f" ({paper:.1f})" if paper else "") for fps, paper in pairs)
        rows.append((f"{row['num_gpus']} × {row['machine']}, {row['size']}", *cells))
    needed = (f"{size / 1e9:.0f} GB" for size in result["memory_needed_bytes"])
    rows.append(("memory of one GPU, 480p (counted, 1.5 GB assumed)", *needed))
    return [
        f"## {result['preset']} in full size: predictions, not measurements",
        "",
        "Frames per second of one stream; in brackets what the paper measured. The model is `roofline.py`, with one",
        "efficiency per machine fitted to one of the paper's figures (B200: H100's, assumed): it predicts the paper's",
        "own way of computing on other machines and more of them, not what faster kernels could reach.",
        "",
        _table(("", *steps), rows),
        "",
    ]


ROWS = (
    ("frames per second", lambda r: f"**{r['fps']:.1f}**"),
    ("real-time factor", lambda r: f"{r['real_time_factor']:.2f}"),
    ("first frame", lambda r: f"{r['ttff_ms']:.0f} ms"),
    ("chunk of 4 frames", lambda r: f"{r['chunk_ms']:.1f} ms"),
    ("… border (resize, convert)", lambda r: _stage(r, "border")),
    ("… encode", lambda r: _stage(r, "encode")),
    ("… denoise", lambda r: _stage(r, "denoise")),
    ("… decode", lambda r: _stage(r, "decode")),
    ("FLOPs a chunk", lambda r: f"{r['chunk_flops']['total'] / 1e9:.2f} G"),
    ("… of the transformer", lambda r: f"{r['chunk_flops']['denoise'] / 1e9:.2f} G"),
    ("transformer, one forward", lambda r: _eager(r, "ours_ms", "{:.1f} ms")),
    ("float32 eager, one forward", lambda r: _eager(r, "eager_ms", "{:.1f} ms")),
    ("faster than float32 eager", lambda r: _eager(r, "speedup", "{:.2f}×")),
    ("stream state", lambda r: f"{r['session_bytes'] / 1e6:.1f} MB"),
)


def to_lines(result: dict[str, Any]) -> list[str]:
    """What a person at the terminal wants to see first."""
    peaks = ", ".join(f"{name} {_tera(peak)}" for name, peak in result["gemm_peak_flops_per_s"].items())
    size = f"{result['width']}×{result['height']}"
    number = result["dtype"] + _rounded(result)
    lines = [
        f"{result['preset']}{_shrunken(result)} {size}, {number}, {result['machine']['hardware']}",
        f"load {result['load_s']:.2f} s, peak memory {_memory(result)}, matrix product peak {peaks}",
    ]
    for run in result["runs"]:
        stages = "  ".join(f"{name} {ms:.1f}" for name, ms in run["stage_ms_per_chunk"].items())
        lines += [
            f"{run['steps']} steps ({run['schedule']}): {run['fps']:.1f} fps, "
            f"{run['real_time_factor']:.2f}× real time, first frame after {run['ttff_ms']:.0f} ms",
            f"  ms per chunk of 4 frames: {run['chunk_ms']:.1f} = {stages}",
            f"  {run['chunk_flops']['total'] / 1e9:.2f} GFLOP a chunk; MFU {run['mfu']:.1%} end to end, "
            f"{run['dit_mfu']:.1%} transformer ({run['mfu_dtype']} peak)",
        ]
        if "paper_fps" in run or "predicted_fps" in run:
            lines.append(f"  paper: {_paper(run)}; roofline prediction for this machine: {_predicted(run)}")
        if "eager_float32" in run:
            lines.append(f"  transformer {run['eager_float32']['speedup']:.2f}× faster than float32 eager")
    return lines


def report_path(result: dict[str, Any], folder: str | Path = "benchmarks/results") -> Path:
    """``<preset>_<hardware>_<yyyymm>.md``."""
    hardware = re.sub(r"[^a-z0-9]+", "-", result["machine"]["hardware"].lower()).strip("-")
    shrunken = f"-shrunken-{result['shrink']}" if result.get("shrink", 1) > 1 else ""
    return Path(folder) / f"{result['preset']}{shrunken}_{hardware}_{result['date'][:7].replace('-', '')}.md"


def save_report(result: dict[str, Any], path: str | Path | None = None) -> Path:
    """Write the Markdown; ``path`` None or a folder: the dated name. Folders are made."""
    target = Path(path) if path else report_path(result)
    target = report_path(result, target) if target.suffix != ".md" else target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(to_markdown(result), encoding="utf-8")
    return target


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ["---"] + ["---:" if len(head) > 2 or head[-1] else "---"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _shrunken(result: dict[str, Any]) -> str:
    return f" shrunken by {result['shrink']}: not the full size" if result["shrink"] > 1 else ""


def _rounded(result: dict[str, Any]) -> str:
    kind = result["quantisation"]
    return f", {kind}" if kind else ""


def _stage(run: dict[str, Any], name: str) -> str:
    return f"{run['stage_ms_per_chunk'].get(name, float('nan')):.1f} ms"


def _eager(run: dict[str, Any], key: str, style: str) -> str:
    return style.format(run["eager_float32"][key]) if "eager_float32" in run else "not measured"


def _paper(run: dict[str, Any]) -> str:
    figures = run.get("paper_fps", {})
    return ", ".join(f"{fps:.1f} fps on {where}" for where, fps in figures.items()) or "no figure"


def _predicted(run: dict[str, Any]) -> str:
    return f"{run['predicted_fps']:.1f} fps" if "predicted_fps" in run else "none"


def _tera(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.3g} TFLOP/s"


def _memory(result: dict[str, Any]) -> str:
    cuda = result["peak_cuda_memory_bytes"]
    on_gpu = f", {cuda / 1e9:.2f} GB on the GPU" if cuda else ""
    return f"{result['peak_memory_bytes'] / 1e9:.2f} GB{on_gpu}"
