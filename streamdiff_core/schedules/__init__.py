"""Denoise schedules: which forwards a chunk goes through, and when it leaves. The registry maps names to builders."""

from streamdiff_core.schedules.sequential import Sequential
from streamdiff_core.schedules.stream_batch import StreamBatch

SCHEDULES = {"sequential": Sequential, "stream_batch": StreamBatch}

__all__ = ["SCHEDULES", "Sequential", "StreamBatch"]
