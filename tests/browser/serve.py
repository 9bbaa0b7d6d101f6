"""Starts the real app around a chosen pipeline, for the browser tests: ``python -m tests.browser.serve --port N``."""

from __future__ import annotations

import argparse

import torch
import uvicorn

from demo.app import create_app
from streamdiff_core import StreamPipeline, recorder
from tests.browser.transparent import transparent_pipeline


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pipe", choices=["tiny", "transparent"], default="transparent")
    parser.add_argument("--seconds-per-forward", type=float, default=0.0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--max-streams", type=int, default=4)
    parser.add_argument("--max-waiting", type=int, default=16)
    parser.add_argument("--recording-seconds", type=float, default=recorder.MAX_RECORDING_S)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = StreamPipeline.from_preset("tiny") if args.pipe == "tiny" else transparent_pipeline(args.seconds_per_forward)
    recorder.MAX_RECORDING_S = args.recording_seconds
    app = create_app(pipe, max_streams=args.max_streams, max_waiting=args.max_waiting)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
