"""KV-cache policies: each file is one rule for what attention may read. The registry maps names to classes."""

from streamdiff_core.kv_policies.sink import SinkPolicy

POLICIES = {"sink": SinkPolicy}

__all__ = ["POLICIES", "SinkPolicy"]
