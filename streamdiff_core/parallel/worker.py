"""What every rank but the first does: take commands from rank 0 in order, run its layers, hand the result on.

A thread receives ahead: a command says which tensors follow and in which shape, so the next micro-batch travels while
this one is computed. Prompts, resets, cache operations and re-balances are commands like any other and so take effect
between the same two micro-batches on every rank.
"""

from __future__ import annotations

import json
import logging
import queue
from dataclasses import asdict
from typing import Any

import torch

from streamdiff_core.parallel.links import Links, Parcel
from streamdiff_core.parallel.stage import MicroBatch, Stage
from streamdiff_core.types import StageLostError

logger = logging.getLogger(__name__)


@torch.inference_mode()
def serve(stage: Stage, links: Links) -> None:
    """Work until rank 0 says stop.

    Raises:
        StageLostError: another rank died, hangs or failed.
    """
    inbox: queue.Queue[tuple[dict[str, Any], list[Parcel]]] = queue.Queue()
    links.guard(lambda: _receive(stage, links, inbox), f"receive {stage.rank}")
    try:
        while True:
            command, parcels = links.get(inbox)
            if command["do"] == "stop":
                links.close()
                links.join()
                return
            carry_out(command, [parcel.open() for parcel in parcels], stage, links)
    except StageLostError:
        links.abandon()
        raise
    except Exception as error:
        links.failed(error)
        links.abandon()
        links.check()
        raise


def _receive(stage: Stage, links: Links, inbox: queue.Queue) -> None:
    """Commands and the tensors they announce, in order."""
    before = stage.rank - 1
    while True:
        command, parcels = links.recv_json("control", 0), []
        if command["do"] == "batch":
            batch = MicroBatch.from_plain(command["batch"])
            parcels.append(links.recv("tokens", (stage.message_size(batch),), stage.dtype, before))
            if stage.is_last:
                parcels.append(links.recv("skip", batch.shape, getattr(torch, batch.dtype), 0))
        elif command["do"] == "prompt":
            parcels.append(links.recv("tokens", (1, stage.config.text_len, stage.config.dim), stage.dtype, before))
        elif command["do"] == "decode" and stage.is_last:
            parcels.append(links.recv("skip", tuple(command["shape"]), getattr(torch, command["dtype"]), 0))
        inbox.put((command, parcels))
        if command["do"] == "stop":
            return


def carry_out(command: dict[str, Any], tensors: list[torch.Tensor], stage: Stage, links: Links) -> None:
    """One command on one rank."""
    arguments = {name: value for name, value in command.items() if name != "do"}
    if command["do"] == "batch":
        _run(MicroBatch.from_plain(command["batch"]), tensors, stage, links)
    elif command["do"] == "prompt":
        if not stage.is_last:
            links.send("tokens", tensors[0], stage.rank + 1)
        stage.set_prompt(command["slot"], tensors[0])
    elif command["do"] == "decode":
        if stage.is_last:
            links.send("pixels", stage.decode(command["stream"], tensors[0], command["chunk_idx"]), 0)
    elif command["do"] == "move_layers":
        stage.move_layers(tuple(command["split"]), links)
    elif command["do"] == "report":
        publish_report(command["key"], stage, links)
    else:
        getattr(stage, command["do"])(**arguments)


def _run(batch: MicroBatch, tensors: list[torch.Tensor], stage: Stage, links: Links) -> None:
    out = stage.run(batch, tensors[0], tensors[1] if stage.is_last else None)
    if not stage.is_last:
        links.send("tokens", out, stage.rank + 1)
    elif out is not None:
        links.send("x0", out, 0)
        for stream, x0 in zip(batch.streams, out, strict=True):
            if stream is not None:
                links.send("pixels", stage.decode(stream, x0, batch.chunk_idx), 0)


def publish_report(key: str, stage: Stage, links: Links) -> None:
    """What this stage costs, holds and did, as JSON in the store under ``key/rank``."""
    times = stage.times()
    report = {
        "times": None if times is None else asdict(times),
        "layers": stage.layers,
        "nbytes": stage.nbytes,
        "origin_s": stage.origin_s,
        "moved_ms": stage.moved_ms[1:],
        "trace": [[e.stage, e.start_ms, e.end_ms, e.chunk_idx] for e in stage.timer.trace()],
    }
    links.store.set(f"{key}/{stage.rank}", json.dumps(report))
