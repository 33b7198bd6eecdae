"""Upstream's path to the responses."""

from flexkv.controller.response import KVResponse, KVResponseStatus

__all__ = ["KVResponse", "KVResponseStatus"]
