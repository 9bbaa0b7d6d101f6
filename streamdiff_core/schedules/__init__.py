"""Denoise schedules: each file says which forwards a chunk goes through and when it leaves, under its own file name.

Files are found, not listed: a new one needs no other edit. All of them speak only ``ForwardOp``, ``Fork`` and
``Emit``, so engine and session know none of them by name. ``steps.py`` is what they share.
"""

from importlib import import_module
from pkgutil import iter_modules

from streamdiff_core.schedules._registry import SCHEDULES, knobs_of, make_schedule, schedule

for _module in sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")):
    import_module(f"{__name__}.{_module}")

Sequential, StreamBatch = SCHEDULES["sequential"], SCHEDULES["stream_batch"]

__all__ = ["SCHEDULES", "Sequential", "StreamBatch", "knobs_of", "make_schedule", "schedule"]
