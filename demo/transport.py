"""The web side of the live stream: the core's routes, which ``streamdiff serve`` shares."""

from streamdiff_core.live_routes import MAX_MESSAGE_BYTES, live_router

__all__ = ["MAX_MESSAGE_BYTES", "live_router"]
