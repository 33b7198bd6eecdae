"""Upstream's path to the part of the data plane that runs on an engine's other nodes."""

from flexkv.server.node_launch import TransferManagerOnRemote

__all__ = ["TransferManagerOnRemote"]
