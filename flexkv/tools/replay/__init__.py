"""``flexkv replay``: computes the hit rate of a trace of requests, by capacity and eviction policy."""

from flexkv.tools.replay.command import main

__all__ = ["main"]
