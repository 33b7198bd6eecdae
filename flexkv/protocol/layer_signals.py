"""Where a rank of SGLang gives its eventfds to the client in the same process, for loads layer by layer."""

import os
from pathlib import Path

from flexkv.config import runtime_directory

MAX_COUNTERS = 64
"""Loads that a rank can tell apart; SGLang has three."""


def layerwise_socket(dp_client_id: int, pp_rank: int) -> Path:
    """The socket of this process: rank and client share it, so no other process has to be told of the descriptors."""
    return runtime_directory() / f"layers-{os.getpid()}-{dp_client_id}-{pp_rank}.sock"


def build_layerwise_eventfd_socket_path(dp_client_id: int, pp_rank: int, model_config: object) -> str:
    """``layerwise_socket`` under upstream's name and signature."""
    return str(layerwise_socket(dp_client_id, pp_rank))
