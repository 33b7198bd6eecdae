"""The socket over which a rank of SGLang passes its eventfds to the client in the same process. A load layer by layer
signals each layer with an eventfd."""

import os
from pathlib import Path

from flexkv.config import runtime_directory

MAX_COUNTERS = 64
"""Maximum number of counters, that is, of loads that a rank can distinguish; SGLang has three."""


def layerwise_socket(dp_client_id: int, pp_rank: int) -> Path:
    """Path of the socket of this process. It contains the process id, because rank and client are in one process."""
    return runtime_directory() / f"layers-{os.getpid()}-{dp_client_id}-{pp_rank}.sock"


def build_layerwise_eventfd_socket_path(dp_client_id: int, pp_rank: int, model_config: object) -> str:
    """``layerwise_socket`` under upstream's name and signature."""
    return str(layerwise_socket(dp_client_id, pp_rank))
