"""Schedules driven by hand on a fake model, and what they did as tuples that can be written out."""

from __future__ import annotations

import torch

from streamdiff_core.schedules.steps import Stepper
from streamdiff_core.types import Chunk, Emit, Fork, ForwardOp

SHAPE = (1, 2, 2, 2)


def noise_of(chunk_idx, step, like):
    """1000 c + 100 s everywhere: a swapped draw is seen at once."""
    return torch.full_like(like, 1000.0 * chunk_idx + 100.0 * step)


def x0_of(row):
    """What the fake model predicts: differs per chunk and step."""
    return torch.full_like(row.xt, row.chunk_idx + row.step / 10)


def make_chunk(idx, timesteps=(700.0, 500.0, 200.0), noise_scale=0.25):
    frames = (0, 1) if idx == 0 else (idx + 1,)
    latents = torch.full((len(frames), *SHAPE[1:]), -1.0)
    return Chunk(
        chunk_idx=idx, frame_ids=frames, latents=latents, noise_scale=noise_scale,
        timesteps=timesteps, prompt=f"prompt {idx}", descriptor=f"descriptor {idx}",
    )  # fmt: skip


def stepper():
    return Stepper(noise_of, lambda timestep: timestep / 1000)


def events_of(schedule, chunk):
    """All events of one push; forwards as lists of their rows."""
    events, reply, log = schedule.push(chunk), None, []
    while True:
        try:
            event = events.send(reply)
        except StopIteration:
            return log
        reply = [x0_of(row) for row in event.rows] if isinstance(event, ForwardOp) else None
        log.append(event)


def short(event):
    """An event as a tuple that can be written by hand."""
    if isinstance(event, ForwardOp):
        return ("forward", *((r.chunk_idx, r.step, r.cache_row) for r in event.rows))
    if isinstance(event, Fork):
        return ("fork", event.src, event.dst)
    assert isinstance(event, Emit)
    return ("emit", event.chunk_idx, round(event.latents.mean().item(), 3))


def short_timed(event):
    """forward of one row: kind, cache row, frames, timestep per frame; emit: chunk."""
    if isinstance(event, Fork):
        return ("fork", event.src, event.dst)
    if isinstance(event, Emit):
        return ("emit", event.chunk_idx)
    (row,) = event.rows
    times = row.timestep if isinstance(row.timestep, tuple) else (row.timestep,)
    return (row.kind, row.cache_row, row.frame_ids, times)


def script(schedule, chunks):
    return [[short(e) for e in events_of(schedule, c)] for c in chunks]
