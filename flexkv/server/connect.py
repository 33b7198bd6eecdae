"""Connects an engine to its controller, in its process or in the daemon, behind one interface."""

import logging
from collections.abc import Sequence

from flexkv.config import CacheConfig, ModelConfig, TransferConfig, domain, runtime_directory
from flexkv.controller.blocks import Blocks
from flexkv.controller.controller import Controller
from flexkv.controller.keys import Keys
from flexkv.protocol.session import Hello
from flexkv.protocol.sockets import socket_path
from flexkv.server.engine_client import EngineClient
from flexkv.server.launch import ensure_daemon, server_port
from flexkv.storage.store import TierKind

logger = logging.getLogger("flexkv.server")


def connect(
    model_config: ModelConfig,
    cache_config: CacheConfig,
    transfer_config: TransferConfig,
    dp_client_id: int = 0,
    gpu_register_port: str = "",
    *,
    tiers: Sequence[TierKind] | None = None,
    note: str = "",
) -> Blocks:
    """The blocks of an engine, not started yet. Arguments as ``Controller``; ``tiers`` and most of ``cache_config`` are
    the daemon's, if ``transfer_config`` says that the engine uses one."""
    if transfer_config.uses_daemon and model_config.nnodes > 1:
        logger.warning("the KV of an engine on several nodes is kept in its own processes: the daemon is not used")
    if not transfer_config.uses_daemon or model_config.nnodes > 1:
        return Controller(
            model_config, cache_config, transfer_config, dp_client_id, gpu_register_port, tiers=tiers, note=note
        )
    number = f"{transfer_config.instance_id}-{dp_client_id}"
    port = gpu_register_port or transfer_config.gpu_register_port or (
        f"ipc://{runtime_directory()}/register-{number}.sock"
    )
    name = domain(model_config, cache_config)
    hello = Hello(
        name.decode(), cache_config.tokens_per_block, model_config.tp_size * model_config.pp_size, dp_client_id,
        str(socket_path(port).absolute()), number, model_config.model_id[:200], 0,
    )
    path = socket_path(server_port(transfer_config))
    if transfer_config.server_launch_mode == "embedded":
        ensure_daemon(path, cache_config, transfer_config)
    return EngineClient(path, hello, Keys(name, cache_config.tokens_per_block, cache_config.secret))
