"""KV-cache policies: each file is one rule for what attention may read, and registers it under its own file name.

Files are found, not listed: a new one needs no other edit. ``_rolling.py`` is the rule they vary.
"""

from importlib import import_module
from pkgutil import iter_modules

from streamdiff_core.kv_policies._head_labels import label_heads
from streamdiff_core.kv_policies._registry import POLICIES, make_policy, policy
from streamdiff_core.kv_policies._rolling import RollingPolicy

for _module in sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")):
    import_module(f"{__name__}.{_module}")

SinkPolicy = POLICIES["sink"]

__all__ = ["POLICIES", "RollingPolicy", "SinkPolicy", "label_heads", "make_policy", "policy"]
