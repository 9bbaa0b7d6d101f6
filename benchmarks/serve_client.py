"""A client of `streamdiff serve` in thirty lines: restyles a folder of JPEG pictures of one size.

streamdiff serve &
python benchmarks/serve_client.py PICTURES OUTPUT "ink on paper"
"""

import json
import struct
import sys
from pathlib import Path

from websockets.sync.client import connect

source, target, prompt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
pictures = sorted(source.glob("*.jpg"))
target.mkdir(exist_ok=True)
with connect("ws://127.0.0.1:8000/stream", max_size=None) as socket:
    socket.send(json.dumps({"type": "start", "prompt": prompt, "exact": True}))
    sent, acked, window = 0, -1, 0
    while True:
        while sent < len(pictures) and sent - acked <= window:
            socket.send(struct.pack("<I", sent) + pictures[sent].read_bytes())
            sent += 1
            if sent == len(pictures):
                socket.send(json.dumps({"type": "finish"}))
        message = socket.recv()
        if isinstance(message, bytes):
            (size,) = struct.unpack_from("<I", message)
            header, at = json.loads(message[4 : 4 + size]), 4 + size
            for seq, num_bytes in header["frames"]:
                (target / pictures[seq].name).write_bytes(message[at : at + num_bytes])
                at += num_bytes
            continue
        news = json.loads(message)
        acked, window = news.get("seq", acked), news.get("chunk_frames", window)
        if news["type"] == "finished" or news.get("fatal"):
            sys.exit(news.get("sentence"))
