"""Which replica a connection goes to, and how many replicas there are: what Ray Serve's proxy and controller ask.

A stream lives where its WebSocket is: its state never moves, so the connection stays with the replica that took it.
A new connection goes to the replica with the fewest; one that sends ``x-session-id`` goes where that name leads while
the number of replicas stays, so that a client finds its recordings again. Scaling follows the planner's own load.
Ray Serve does the rest. Nothing of the model is imported here, since those processes have none.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

SCALE_LOAD = 0.7
"""Mean load that replicas are added for; below what admission allows, so that a newcomer seldom waits."""


class SessionRouter(ConsistentHashRouter):
    """By the name of the session where there is one, otherwise to the replica with the fewest connections."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas to try; within a rank Ray takes the one with the fewest requests under way."""
        if pending_request is None or pending_request.metadata.session_id:
            return await super().choose_replicas(candidate_replicas, pending_request)
        return [candidate_replicas]


def scale_by_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas there should be; Ray applies bounds and delays.

    As many as bring the mean load below ``SCALE_LOAD``, and one more than now while somebody waits in line.
    """
    figures = context.aggregated_metrics or {}
    loads, waiting = figures.get("load") or {}, figures.get("waiting") or {}
    if not loads:  # nobody has reported yet
        return context.target_num_replicas, {}
    wanted = max(1, math.ceil(sum(loads.values()) / SCALE_LOAD))
    if sum(waiting.values()) > 0:
        wanted = max(wanted, context.current_num_replicas + 1)
    return wanted, {}
