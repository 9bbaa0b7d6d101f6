"""Stage 1: the text encoder, trained to tell styles apart from any wording.

A linear read-out of the mean token classifies the style; prompts are generated with random wording, order and
subject, and words that nobody knows are mixed in, so that unknown words learn to say nothing. The encoder is
then frozen, so that the transformer sees paraphrases as near neighbours, and unseen wordings can be checked
before any picture is drawn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff_core.config import TextConfig
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.training.data import STYLE_NAMES
from streamdiff_core.training.prompts import HELD_OUT_PROMPTS, sample_prompt
from streamdiff_core.training.runs import Run, set_learning_rate

LETTERS = "aaabcdeeeeefghiiijklmnnooopqrrsssttttuvwxyz"
PEAK_LR = 2e-3
LOG_EVERY_STEPS = 100


def pool(tokens: Tensor) -> Tensor:
    """Mean of the non-padding tokens: [B, text_len, D] -> [B, D]."""
    used = tokens.abs().sum(-1, keepdim=True) > 0
    return tokens.sum(1) / used.sum(1).clamp_min(1)


def with_strangers(prompt: str, rng: np.random.Generator) -> str:
    """The prompt with up to four made-up words in random places."""
    words = prompt.split()
    for _ in range(rng.integers(0, 5)):
        stranger = "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), rng.integers(2, 10)))
        words.insert(rng.integers(0, len(words) + 1), stranger)
    return " ".join(words)


@torch.no_grad()
def held_out_accuracy(encoder: TinyTextEncoder, readout: nn.Linear) -> tuple[float, list[str]]:
    """Share of held-out prompts assigned to their style, and the ones that are not."""
    pairs = [(style, prompt) for style, prompts in HELD_OUT_PROMPTS.items() for prompt in prompts]
    guess = readout(pool(encoder.encode([p for _, p in pairs]))).argmax(1).tolist()
    answers = [(style, prompt, STYLE_NAMES[g]) for (style, prompt), g in zip(pairs, guess, strict=True)]
    wrong = [f"{prompt!r}: {answer} for {style}" for style, prompt, answer in answers if answer != style]
    return 1 - len(wrong) / len(pairs), wrong


def train_text(folder: Path, config: TextConfig, *, num_steps: int = 2000, batch: int = 64, seed: int = 0) -> None:
    """Train into ``folder``; resumes by itself and then ends with the same weights as an unbroken run."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    encoder, readout = TinyTextEncoder(config), nn.Linear(config.dim, len(STYLE_NAMES))
    parameters = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.05)
    run = Run(folder, encoder=encoder, readout=readout, optimizer=optimizer)
    with run, tqdm(range(run.step, num_steps), initial=run.step, total=num_steps, desc="text") as bar:
        for step in bar:
            rng = np.random.default_rng([seed, step])
            labels = torch.from_numpy(rng.integers(0, len(STYLE_NAMES), batch))
            prompts = [with_strangers(sample_prompt(STYLE_NAMES[i], rng), rng) for i in labels.tolist()]
            set_learning_rate(optimizer, PEAK_LR * min(1, (step + 1) / 50) * (1 - step / num_steps))
            tokens = encoder.encode(prompts)
            keep = torch.from_numpy(rng.random(tokens.shape[:2]) < 0.6)  # a part of the words is enough
            loss = F.cross_entropy(readout(pool(tokens * keep[..., None])), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step = step + 1
            if run.step % LOG_EVERY_STEPS == 0 or run.step == num_steps:
                accuracy, wrong = held_out_accuracy(encoder, readout)
                run.log({"loss": loss.item(), "held_out_accuracy": accuracy})
                run.save()
                bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{accuracy:.1%}")
                if run.step == num_steps and wrong:
                    (folder / "wrong.txt").write_text("\n".join(wrong) + "\n", encoding="utf-8")
