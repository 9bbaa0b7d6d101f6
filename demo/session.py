"""One connection of the page: it is the core's, which ``streamdiff serve`` shares. No Gradio here."""

from streamdiff_core.live_codec import encode_jpeg
from streamdiff_core.live_connection import Connection

__all__ = ["Connection", "encode_jpeg"]
