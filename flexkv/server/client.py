"""Upstream's path to the client of a rank."""

from flexkv.rank.tp_client import KVTPClient

__all__ = ["KVTPClient"]
