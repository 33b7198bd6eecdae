"""Upstream's path to the responses."""

from flexkv.response import KVResponse, KVResponseStatus

__all__ = ["KVResponse", "KVResponseStatus"]
