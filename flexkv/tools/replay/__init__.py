"""``flexkv replay``: what hit rate a trace of requests would have had, by capacity and eviction policy."""

from flexkv.tools.replay.command import main

__all__ = ["main"]
