"""A vLLM engine whose ranks are on several nodes: its scheduler has the controller, and each further node a storage
host."""

import dataclasses
import logging
from typing import TYPE_CHECKING

from flexkv.config import FlexKVConfig
from flexkv.errors import FlexKVError
from flexkv.server.node_launch import TransferManagerOnRemote

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")


def num_nodes(vllm_config: "VllmConfig") -> int:
    """Number of nodes of this engine."""
    parallel = vllm_config.parallel_config
    return int(getattr(parallel, "nnodes_within_dp", 0) or getattr(parallel, "nnodes", 1))


def unsupported_nodes(vllm_config: "VllmConfig", config: FlexKVConfig) -> str | None:
    """The reason why the ranks of this engine cannot be connected over nodes; None: they can, or are on one node."""
    nodes, parallel = num_nodes(vllm_config), vllm_config.parallel_config
    if nodes == 1:
        return None
    if parallel.world_size % nodes:
        return f"{parallel.world_size} ranks on {nodes} nodes; FlexKV supports equal numbers on all nodes"
    if not config.transfer.node_secret:
        return f"the engine runs on {nodes} nodes, and node_secret is not set: set it to the same text on all of them"
    return None


def settings_of_nodes(vllm_config: "VllmConfig", config: FlexKVConfig, rank: int) -> FlexKVConfig:
    """The settings of an engine on several nodes: address of the first node, unless it is given, and a TCP port of its
    own for each data-parallel ``rank``."""
    if num_nodes(vllm_config) == 1:
        return config
    transfer = config.transfer
    host = transfer.master_host if "master_host" in config.given else str(vllm_config.parallel_config.master_addr)
    transfer = transfer.replace(
        master_host=host, master_ports=str(transfer.master_port + rank), server_client_mode=False, server_recv_port="",
        instance_num=1,
    )
    return dataclasses.replace(config, transfer=transfer)


def start_storage_host(vllm_config: "VllmConfig", config: FlexKVConfig, port: str) -> TransferManagerOnRemote | None:
    """Start the storage host of this node, if this worker has the lowest rank of a node other than the first; else
    None. ``port``: path of the socket at which the node's ranks register. The caller shuts it down. If it cannot be
    started, the log says so, and KV is neither loaded nor saved."""
    parallel = vllm_config.parallel_config
    nodes = num_nodes(vllm_config)
    node, local_rank = divmod(int(parallel.rank), int(parallel.world_size) // nodes)
    if node == 0 or local_rank != 0:
        return None
    transfer = config.transfer
    try:
        return TransferManagerOnRemote.create_process(
            transfer.master_host, transfer.master_ports, gpu_register_port=port, node_secret=transfer.node_secret,
            cpu_cache_gb=config.cache.cpu_cache_gb, num_cpu_blocks=config.cache.num_cpu_blocks,
        )
    except (FlexKVError, OSError) as error:
        logger.error("the storage host of this node cannot be started, so no KV is loaded or saved: %s", error)
        return None
