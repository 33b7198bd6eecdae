"""Connects an engine to its controller."""

from collections.abc import Sequence

from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.blocks import Blocks
from flexkv.controller.controller import Controller
from flexkv.storage.store import TierKind


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
    """The blocks of an engine, not started yet; a controller in this process. Arguments as ``Controller``."""
    return Controller(
        model_config, cache_config, transfer_config, dp_client_id, gpu_register_port, tiers=tiers, note=note
    )
