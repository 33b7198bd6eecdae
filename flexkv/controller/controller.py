"""The controller: a cache in the engine's process, for this engine alone."""

import itertools
import logging
import time
from collections.abc import Sequence

from flexkv.at_exit import close_at_exit
from flexkv.config import CacheConfig, ModelConfig, TransferConfig, domain, runtime_directory
from flexkv.controller.engine_blocks import EngineBlocks
from flexkv.controller.keys import Keys
from flexkv.controller.shared_cache import SharedCache
from flexkv.errors import ConfigError
from flexkv.metrics.exporter import Metrics
from flexkv.storage.store import TierKind

logger = logging.getLogger("flexkv.controller")

_EPOCH_MS = 1_700_000_000_000
"""Task ids of controllers with several nodes begin with the milliseconds since this time."""


def _first_task() -> int:
    """A number below the ids of a new controller's tasks, and above those of all earlier ones, unless the clock was set
    back."""
    return max(1, time.time_ns() // 1_000_000 - _EPOCH_MS) << 20


def _check_nodes(num_ranks: int, num_nodes: int, config: TransferConfig) -> None:
    """ConfigError unless an engine of ``num_ranks`` ranks can run on ``num_nodes`` nodes with these settings."""
    if num_ranks % num_nodes:
        raise ConfigError("nnodes", num_nodes, f"must divide the number of ranks, {num_ranks}, into equal parts")
    if not config.node_secret:
        raise ConfigError("node_secret", "", f"must be set to the same text on all {num_nodes} nodes of the engine")


class Controller(EngineBlocks):
    """The blocks of one engine, in this process.

    Parameters
    ----------
    model_config, cache_config, transfer_config
    dp_client_id : int
        Data-parallel rank of the engine.
    gpu_register_port : str
        Path of the Unix socket where the ranks register; empty: from ``transfer_config``.
    tiers : sequence of TierKind, optional
        The tiers below host memory, the fastest first. Default: those of the configuration.
    note : str
        Text at the end of the log line that reports readiness, such as the engine's role.

    Attributes
    ----------
    metrics : Metrics or None
        None: the setting ``enable_metrics`` is off.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        transfer_config: TransferConfig,
        dp_client_id: int = 0,
        gpu_register_port: str = "",
        *,
        tiers: Sequence[TierKind] | None = None,
        note: str = "",
    ) -> None:
        ranks, num_nodes = model_config.tp_size * model_config.pp_size, model_config.nnodes
        if num_nodes > 1:
            _check_nodes(ranks, num_nodes, transfer_config)
            if cache_config.ssd_bytes or tiers:
                logger.warning("blocks are kept in host memory alone: an engine on several nodes has no SSD tier yet")
            tiers = ()
        if cache_config.enable_gds and ranks > 1:
            raise ConfigError(
                "enable_gds", True, f"supports one rank in this version; this model has {ranks}: turn it off"
            )
        first_task = _first_task() if num_nodes > 1 else 0         # ranks of other nodes may outlive this controller
        default_port = f"ipc://{runtime_directory()}/register-{dp_client_id}.sock"
        self._port = gpu_register_port or transfer_config.gpu_register_port or default_port
        name = domain(model_config, cache_config)
        labels = {"model_name": model_config.model_id, "engine": str(dp_client_id)}
        metrics_port = cache_config.py_metrics_port and cache_config.py_metrics_port + dp_client_id
        cache = SharedCache(
            cache_config, transfer_config, name, labels, metrics_port, tiers=tiers,
            ranks="1 rank" if ranks == 1 else f"{ranks} ranks" + (f" on {num_nodes} nodes" if num_nodes > 1 else ""),
            note=note,
        )
        super().__init__(
            cache, Keys(name, cache_config.tokens_per_block, cache_config.secret), cache_config.tokens_per_block,
            ranks // num_nodes, dp_client_id, transfer_config.op_timeout_s, num_nodes=num_nodes, first_task=first_task,
            task_ids=itertools.count(first_task + 1) if first_task else None,
        )

    @property
    def metrics(self) -> Metrics | None:
        """The metrics; None: the setting ``enable_metrics`` is off."""
        return self._cache.metrics

    def start(self) -> None:
        """See ``Blocks``. The host pool is made when all ranks have registered."""
        self._cache.start(self.group, self._port)
        close_at_exit(self, type(self).shutdown)

    def shutdown(self) -> None:
        """See ``Blocks``."""
        self._cache.shutdown()
