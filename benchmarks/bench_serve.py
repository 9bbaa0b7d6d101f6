"""The live engine under load: batching against turns, deadlines, first frames, overload; planner, FIFO, simulator.

    python benchmarks/bench_serve.py --minutes 5        # on a quiet machine; writes benchmarks/results/serve_….md

Viewers send camera frames at their own pace into a `LiveEngine` of this process and read what comes out, from one
thread; pictures are not packed as JPEG, so this is the engine without the network. A frame is missed when it comes
out later than `DEADLINE_MS` after it was sent, or not at all. Every comparison is measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from streamdiff_core import LiveEngine, LiveReply, LiveStream, ServerFullError, StreamPipeline, scenarios, simulator
from streamdiff_core.admission import AdmissionOptions
from streamdiff_core.config import Preset, get_preset
from streamdiff_core.live_turns import ONLY_STEPS, Turns
from streamdiff_core.machine import machine_facts, source_commit
from streamdiff_core.planner import plan, plan_fifo
from streamdiff_core.slo import PlannerOptions
from streamdiff_core.timing import percentile

DEADLINE_MS = 1000.0
AS_ASKED = PlannerOptions(degrade=())
NUM_STREAMS = 4
ROUNDS, ROUNDS_OF_CAPACITY = 3, 9
"""Of each count of streams, and of ``NUM_STREAMS``, whose median is the capacity: single rounds differ by a third."""


def picture_loop(side: int) -> np.ndarray:
    """A second of drifting waves, uint8 [16, side, side, 3]."""
    y, x = np.mgrid[:side, :side] / side
    waves = [
        np.stack([np.sin(9 * x + t / 2.5 + c) + np.cos(7 * y - t / 4 + c) for c in range(3)], -1) for t in range(16)
    ]
    return (127.5 + 60 * np.stack(waves)).astype(np.uint8)


@dataclass(slots=True, eq=False)
class Viewer:
    """Sends frames, notes when they come back."""

    stream: LiveStream
    fps: float
    """0: as many as the model takes."""
    joined_s: float
    sent_s: list[float] = field(default_factory=list)
    lag_ms: dict[int, float] = field(default_factory=dict)
    place: int | None = None
    """In line, while waiting."""
    ended_s: float | None = None

    @property
    def is_in(self) -> bool:
        """Whether it was let in and its stream has begun."""
        return self.stream.inbox is not None

    def send(self, now_s: float, pictures: np.ndarray) -> None:
        """The next of pictures [N, H, W, 3], uint8, taken in turn; one that is not admitted counts as sent."""
        seq = len(self.sent_s)
        self.sent_s.append(now_s)
        if self.stream.admit(seq):
            self.stream.put(seq, pictures[seq % len(pictures)])

    def read(self, now_s: float) -> bool:
        """Take everything that came."""
        got = False
        while (event := self.stream.next_event()) is not None:
            got = True
            if isinstance(event, LiveReply):
                self.lag_ms |= {seq: 1e3 * (now_s - self.sent_s[seq]) for seq, _ in event.frames}
            elif event["type"] == "stats" and event["waiting"]:
                self.place = event["waiting"]["position"]
            elif event["type"] == "error":
                print("   ", event["sentence"])
        return got

    def misses(self, since_s: float, end_s: float) -> tuple[int, int]:
        """(missed, due) of the frames sent from ``since_s`` on that should be out by ``end_s``."""
        end_s = min(end_s, self.ended_s or math.inf)
        due = [i for i, at in enumerate(self.sent_s) if since_s <= at <= end_s - DEADLINE_MS / 1e3]
        return sum(self.lag_ms.get(i, math.inf) > DEADLINE_MS for i in due), len(due)

    @property
    def ttff_ms(self) -> float:
        """From the first frame sent to the first frame out."""
        return 1e3 * (min(self.sent_s[i] + ms / 1e3 for i, ms in self.lag_ms.items()) - self.sent_s[0])


class Crowd:
    """Viewers of one engine, served from this thread."""

    def __init__(self, engine: LiveEngine, side: int) -> None:
        self.engine, self.pictures, self.viewers, self.num_refused = engine, picture_loop(side), [], 0

    def join(self, fps: float) -> Viewer | None:
        """Another viewer, who may have to wait in line; None when refused."""
        try:
            stream = self.engine.open("ink on paper", {}, fps=fps or None)
        except ServerFullError:
            self.num_refused += 1
            return None
        self.viewers.append(Viewer(stream, fps, time.monotonic()))
        return self.viewers[-1]

    def leave(self, viewer: Viewer) -> None:
        """End a viewer's stream."""
        viewer.ended_s = time.monotonic()
        self.engine.close(viewer.stream)

    def run(self, seconds: float, each: Callable[[float], None] = lambda now_s: None) -> None:
        """Send what is due and read what came for so long; ``each`` is called in every round."""
        end_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < end_s:
            news = False
            each(now_s)
            for viewer in self.viewers:
                if viewer.ended_s is not None:
                    continue
                news |= viewer.read(time.monotonic())
                if viewer.is_in:
                    news |= self._feed(viewer, now_s)
            if news:
                self.engine.wake()
            time.sleep(0.01)

    def _feed(self, viewer: Viewer, now_s: float) -> bool:
        if not viewer.fps:
            wants = len(viewer.stream.inbox) < viewer.stream.frames_wanted
        else:
            wants = not viewer.sent_s or now_s >= viewer.sent_s[-1] + 1 / viewer.fps
        if wants and viewer.fps and viewer.sent_s:  # keep the pace, however late this thread is
            now_s = max(viewer.sent_s[-1] + 1 / viewer.fps, now_s - 0.05)
        if wants:
            viewer.send(now_s, self.pictures)
        return wants

    def until_in(self, num_viewers: int) -> None:
        """Run until so many viewers are in."""
        while sum(v.is_in for v in self.viewers) < num_viewers:
            self.run(0.05)

    def miss_rate(self, since_s: float) -> float:
        """Of those inside: share of the frames sent from ``since_s`` on and due by now that missed the deadline."""
        pairs = [v.misses(since_s, time.monotonic()) for v in self.viewers if v.is_in]
        return sum(m for m, _ in pairs) / max(1, sum(d for _, d in pairs))

    def fps(self, since_s: float) -> float:
        """Frames of all viewers per second that came out since then."""
        now_s = time.monotonic()
        out = sum(v.sent_s[i] + ms / 1e3 >= since_s for v in self.viewers for i, ms in v.lag_ms.items())
        return out / (now_s - since_s)


class Bench:
    """All measurements on one preset."""

    def __init__(self, load: Callable[[], StreamPipeline], preset: Preset, seconds: float) -> None:
        self.load_pipe, self.preset, self.seconds = load, preset, seconds
        self.lines: list[str] = []

    def crowd(self, turns: Turns, admission: AdmissionOptions | None = None) -> Crowd:
        """A new engine with its model loaded, and nobody there yet."""
        # Loaded in the engine's thread, as the servers do: a second thread with OpenMP workers slows both down.
        engine = LiveEngine(self.load_pipe, max_streams=64, idle_s=None, admission=admission, turns=turns)
        while engine.pipe is None:
            time.sleep(0.05)
        return Crowd(engine, self.preset.width)

    def say(self, line: str = "") -> None:
        """Print a line and keep it for the report."""
        print(line, flush=True)
        self.lines.append(line)

    # --- (a) -----------------------------------------------------------------------------------------------------

    def saturated_fps(self, num_streams: int, turns: Turns, seconds: float) -> float:
        """Frames per second of all streams together, each fed as fast as the model takes frames."""
        crowd = self.crowd(turns)
        for _ in range(num_streams):
            crowd.join(0.0)
        crowd.until_in(num_streams)
        crowd.run(2.0)
        start_s = time.monotonic()
        crowd.run(seconds)
        fps = crowd.fps(start_s)
        crowd.engine.shutdown()
        return fps

    def throughput(self, counts: Sequence[int]) -> float:
        """Together against one stream after another, in turn; frames per second of all at ``NUM_STREAMS``."""
        self.say("## Throughput: streams together against one after another, medians of the rounds\n")
        self.say("| streams | together, fps | one after another, fps | ratio of each round | median |")
        self.say("| --- | --- | --- | --- | --- |")
        capacity = 0.0
        one_by_one = PlannerOptions(degrade=(), fixed_batch=1)
        for count in counts:
            together, alone = [], []
            rounds = ROUNDS_OF_CAPACITY if count == NUM_STREAMS else ROUNDS
            for _ in range(rounds):  # one after the other, since the machine drifts
                together.append(self.saturated_fps(count, Turns(AS_ASKED), self.seconds))
                alone.append(self.saturated_fps(count, Turns(one_by_one, policy=plan_fifo), self.seconds))
            ratios = [a / b for a, b in zip(together, alone, strict=True)]
            capacity = median(together) if count == NUM_STREAMS else capacity
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            self.say(f"| {count} | {median(together):.1f} | {median(alone):.1f} | {each} | {median(ratios):.2f} |")
        return capacity

    # --- (b), (d) ------------------------------------------------------------------------------------------------

    def steady(self, name: str, fps: float, num_streams: int, turns: Turns, admission: AdmissionOptions | None,
               minutes: float) -> None:  # fmt: skip
        """One line of the load table: viewers at a fixed pace, and what the simulator says of those who got in."""
        crowd = self.crowd(turns, admission)
        for _ in range(num_streams):
            crowd.join(fps)
            crowd.run(0.3)
        crowd.run(5.0)  # the begin is measured as time to first frame
        start_s, bytes_before = time.monotonic(), crowd.engine.nbytes
        crowd.run(60 * minutes)
        inside = [v for v in crowd.viewers if v.is_in]
        waiting = [v.place for v in crowd.viewers if not v.is_in]
        mine = f"{crowd.fps(start_s):.1f} | {crowd.miss_rate(start_s):.2%}"
        steps = {v.stream.session.options.steps for v in inside}
        model, growth = crowd.engine.turns.model, crowd.engine.nbytes / max(1, bytes_before)
        crowd.engine.shutdown()
        options = crowd.engine.turns.planner_options([v.stream for v in inside])
        policy = plan_fifo if "FIFO" in name else plan
        world = simulator.World(true_model=model, options=options, admission=None, policy=policy)
        people = [scenarios.Viewer(join_s=0.3 * i, fps=fps, steps=self.preset.schedule.default_steps,
                                   deadline_ms=DEADLINE_MS) for i in range(len(inside))]  # fmt: skip
        report = simulator.simulate(people, world, 60 * minutes)
        theirs = f"{report.fps:.1f} | {report.miss_rate:.2%}"
        line = f"{len(inside)} | {len(waiting)} ({waiting}) | {crowd.num_refused} | {sorted(steps)}"
        self.say(f"| {name} | {num_streams} × {fps:.1f} | {line} | {mine} | {theirs} | {growth:.2f} |")

    def load(self, capacity: float, minutes: float) -> None:
        """80 % and 150 % of what was measured."""
        fps = 0.8 * capacity / NUM_STREAMS
        many = math.ceil(1.5 * capacity / fps)
        case = f"{minutes:g} minutes, FIFO at most 1; simulated: those who got in"
        self.say(f"\n## Load: capacity {capacity:.1f} fps, deadline {DEADLINE_MS:.0f} ms, {case}\n")
        self.say("| case | offered, fps | inside | in line (places) | refused | steps | fps | missed | simulated fps | "
                 "simulated missed | bytes after / before |\n" + "| --- " * 11 + "|")  # fmt: skip
        self.steady("80 %, planner", fps, NUM_STREAMS, Turns(ONLY_STEPS), AdmissionOptions(), minutes)
        self.steady("150 %, planner", fps, many, Turns(ONLY_STEPS), AdmissionOptions(), minutes)
        for name, count in (("80 %, FIFO", NUM_STREAMS), ("150 %, FIFO", many)):
            self.steady(name, fps, count, Turns(AS_ASKED, policy=plan_fifo), None, min(1.0, minutes))

    # --- (c) -----------------------------------------------------------------------------------------------------

    def first_frames(self, capacity: float, minutes: float) -> None:
        """Viewers of 16 fps who come one after the other while others run at 60 % of the capacity."""
        fps = 0.6 * capacity / (NUM_STREAMS - 1)
        self.say("\n## Time to first frame of a joining viewer, first frame sent to first frame out\n")
        self.say("| policy | joins | p50, ms | p95, ms |\n| --- | --- | --- | --- |")
        for name, turns in (("planner", Turns(ONLY_STEPS)), ("FIFO", Turns(AS_ASKED, policy=plan_fifo))):
            crowd, joiners = self.crowd(turns), []
            for _ in range(NUM_STREAMS - 1):
                crowd.join(fps)
            crowd.run(5.0)

            def come_and_go(now_s: float, crowd: Crowd = crowd, joiners: list[Viewer] = joiners) -> None:
                if not joiners or now_s - joiners[-1].joined_s > 4.0:
                    joiners.append(crowd.join(16.0))
                elif joiners[-1].ended_s is None and now_s - joiners[-1].joined_s > 3.0:
                    crowd.leave(joiners[-1])

            crowd.run(60 * minutes, come_and_go)
            crowd.engine.shutdown()
            times = [v.ttff_ms for v in joiners if v.lag_ms]
            self.say(f"| {name} | {len(joiners)} | {percentile(times, 50):.0f} | {percentile(times, 95):.0f} |")


def main() -> None:
    """Measure all and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of each case under load (default 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each point of the curve (default 10)")
    parser.add_argument("--counts", default="1,2,3,4,5,6,7,8", help="streams of the curve; has to hold 4")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/serve_HARDWARE_YYYYMM.md")
    args = parser.parse_args()
    counts = [int(count) for count in args.counts.split(",")]
    if NUM_STREAMS not in counts:
        parser.error(f"--counts must hold {NUM_STREAMS}: its throughput is the capacity")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    facts, today = machine_facts(device), datetime.date.today()
    load = partial(StreamPipeline.from_preset, args.preset, device=device)
    bench = Bench(load, get_preset(args.preset), args.seconds)
    bench.say(f"# Serving with `{args.preset}`, {today}\n")
    command = f"python benchmarks/bench_serve.py --minutes {args.minutes:g}"
    bench.say(
        f"{facts['hardware']}; torch {facts['torch']}, {facts['torch_threads']} threads; commit {source_commit()}."
    )
    bench.say(f"`{command}`. The load generator runs on the same machine.\n")
    capacity = bench.throughput(counts)
    bench.first_frames(capacity, min(2.0, args.minutes))
    bench.load(capacity, args.minutes)
    name = re.sub(r"[^a-z0-9]+", "-", facts["hardware"].lower()).strip("-")
    path = args.output or Path("benchmarks/results") / f"serve_{name}_{today:%Y%m}.md"
    path.write_text("\n".join(bench.lines) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
