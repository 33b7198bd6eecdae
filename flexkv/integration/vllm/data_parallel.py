"""Data-parallel ranks of one vLLM. They share the daemon's cache; without the daemon each has a cache of its own."""

import dataclasses
from typing import TYPE_CHECKING

from flexkv.config import FlexKVConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def data_parallel_rank(vllm_config: "VllmConfig") -> int:
    """Number of this engine among the data-parallel ranks.

    vLLM gives independent ranks size 1 and rank 0, and only their index differs.
    """
    return int(getattr(vllm_config.parallel_config, "data_parallel_index", 0) or 0)


def settings_of_rank(config: FlexKVConfig, rank: int) -> FlexKVConfig:
    """The settings of a data-parallel rank. Paths that it does not share get a suffix, except for rank 0."""
    if rank == 0:
        return config
    cache, transfer, connector = config.cache, config.transfer, config.connector
    if not transfer.uses_daemon:
        directories = ";".join(str(path / f"dp{rank}") for path in cache.ssd_directories)
        cache = cache.replace(ssd_cache_dir=directories, trace_path=cache.trace_path and f"{cache.trace_path}.dp{rank}")
    if transfer.gpu_register_port:
        transfer = transfer.replace(gpu_register_port=f"{transfer.gpu_register_port}.dp{rank}")
    if connector.audit_path:
        connector = connector.replace(audit_path=f"{connector.audit_path}.dp{rank}")
    return dataclasses.replace(config, cache=cache, transfer=transfer, connector=connector)
