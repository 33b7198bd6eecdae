"""The controller: index, tiers, data plane and tasks of one engine, wired together."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher, chain_seed, hash_blocks
from flexkv.at_exit import close_at_exit
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import policy_class
from flexkv.cache.quotas import Quotas
from flexkv.config import (
    CacheConfig,
    ModelConfig,
    TransferConfig,
    changed_domain,
    domain,
    load_config,
    runtime_directory,
)
from flexkv.controller.requests import Control
from flexkv.controller.tasks.arguments import extras_of, namespace_of, seconds_of, tokens_of
from flexkv.controller.tasks.table import TaskTable
from flexkv.controller.tiering import Tiering, make_ssd_store
from flexkv.errors import ArgumentError, ConfigError, FlexKVError, NotReadyError, PinError
from flexkv.metrics.exporter import Metrics
from flexkv.metrics.match_counts import MatchCounts
from flexkv.metrics.request_trace import make_recorder
from flexkv.protocol.requests import Pin
from flexkv.protocol.sockets import remove_dead_sockets
from flexkv.storage.store import MakeStore
from flexkv.transfer.engine import TransferEngine

logger = logging.getLogger("flexkv.controller")

_MAX_SEEDS = 256
"""Chain seeds of namespaces that are remembered; to make one costs as much as all checks of a request."""


class Controller:
    """Index, tiers, data plane and tasks of one engine (one data-parallel client), wired together.

    Never blocks on a transfer except in ``wait``, ``reset`` and ``shutdown``. Matches are empty and puts save nothing
    until every rank has registered its tensors, after ``shutdown``, and while the data plane is out of service. Thread
    safe.

    Parameters
    ----------
    model_config, cache_config : ModelConfig, CacheConfig
    dp_client_id : int
        Data-parallel rank of the engine.
    server_recv_port : str
        Accepted for upstream's signature; there is no server process in this version.
    gpu_register_port : str
        Path of the Unix socket where the ranks register; empty: from ``transfer_config``.
    event_collector : object
        Accepted for upstream's signature; must be None in this version.
    transfer_config : TransferConfig, optional
        Default: from ``FLEXKV_CONFIG_PATH`` and ``FLEXKV_*`` variables.
    make_store : callable
        Makes the store of the SSD tier; for tests.
    note : str
        End of the line that the log gets when the manager is ready, such as the engine's role.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        dp_client_id: int = 0,
        server_recv_port: str = "",
        gpu_register_port: str = "",
        event_collector: None = None,
        *,
        transfer_config: TransferConfig | None = None,
        make_store: MakeStore = make_ssd_store,
        note: str = "",
    ) -> None:
        if event_collector is not None:
            raise NotImplementedError("event_collector: KV events are not available in this version; pass None")
        self._cache_config = cache_config
        self._tokens_per_block = cache_config.tokens_per_block
        self._domain = domain(model_config, cache_config)
        self._make_policy = partial(
            policy_class(cache_config.eviction_policy), hit_reward_seconds=cache_config.hit_reward_seconds
        )
        self._quotas = Quotas(cache_config.quotas)
        self._chain_seed = lru_cache(_MAX_SEEDS)(chain_seed)
        ranks = model_config.tp_size * model_config.pp_size
        if cache_config.enable_gds and ranks > 1:
            raise ConfigError(
                "enable_gds", True, f"supports one rank in this version; this model has {ranks}: turn it off"
            )
        self._counts = MatchCounts()
        self.metrics = self._make_metrics(model_config, cache_config, dp_client_id)
        self._cache: GlobalCacheEngine | None = None
        self._is_closed = self._has_logged_out_of_service = False
        self._note = note
        self._ranks = ranks
        self._tiering = None
        if cache_config.ssd_bytes:
            self._tiering = Tiering(cache_config, self._domain, make_store, self._log_ready)
        transfer_config = transfer_config or load_config().transfer
        self._host_only = transfer_config.enable_layerwise_transfer
        default_port = f"ipc://{runtime_directory()}/register-{dp_client_id}.sock"
        port = gpu_register_port or transfer_config.gpu_register_port or default_port
        transfer_config = transfer_config.replace(gpu_register_port=port)
        self._transfer = TransferEngine(
            transfer_config,
            host_bytes=cache_config.host_bytes,
            num_slots=cache_config.num_cpu_blocks,
            ranks=ranks,
            dp_client_ids=(dp_client_id,),
            hugepage_bytes=cache_config.hugepage_bytes,
            on_capacity=self._on_capacity,
            on_control=Control(self.pin, self.unpin, self.pins).answer,
            housekeeping=self._keep_house,
            on_gds=self._tiering.attach_gds if self._tiering is not None and cache_config.enable_gds else None,
            observe=self.metrics.transfer_ended if self.metrics is not None else None,
        )
        self._tasks = TaskTable(
            self._transfer, dp_client_id, self._tokens_per_block, self._tiering, transfer_config.op_timeout_s
        )
        self.recorder = make_recorder(cache_config)      # adapters that match by keys tell it of each request

    def _make_metrics(self, model_config: ModelConfig, config: CacheConfig, dp_client_id: int) -> Metrics | None:
        if not config.enable_metrics:
            return None
        labels = {"model_name": model_config.model_id, "engine": str(dp_client_id)}
        port = config.py_metrics_port and config.py_metrics_port + dp_client_id
        return Metrics(self.stats, labels, config.metrics_host, port)

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for the ranks; returns at once. The host pool is made when all of them have registered."""
        self._transfer.start()
        with suppress(FlexKVError, OSError):     # of controllers that died
            remove_dead_sockets(runtime_directory())
        close_at_exit(self, type(self).shutdown)
        if self.metrics is not None:
            self.metrics.start()

    def is_ready(self) -> bool:
        """Whether every rank has registered, so that KV can be loaded and saved."""
        return self._transfer.is_ready and self._index is not None

    @property
    def _index(self) -> GlobalCacheEngine | None:
        """The index, while blocks can be moved."""
        if self._is_closed:
            return None
        if not self._transfer.in_service:
            if not self._has_logged_out_of_service:
                self._has_logged_out_of_service = True
                logger.error("the data plane is out of service: nothing is loaded or saved any more; see the log above")
            return None
        return self._cache

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until every rank has registered, so that KV can be loaded and saved.

        Parameters
        ----------
        timeout : float
            Seconds.

        Raises
        ------
        NotReadyError
            A rank has not registered by then, or the manager was not started or was shut down.
        """
        timeout = seconds_of(timeout, "timeout")
        self._transfer.wait(
            lambda: self.is_ready() or self._is_closed or not self._transfer.in_service,
            timeout if self._transfer.describe_ranks() else 0.0,
        )
        if not self.is_ready():
            ranks = self._transfer.describe_ranks()
            raise NotReadyError(
                "the data plane is out of service: see the log" if not self._transfer.in_service else
                "the manager was shut down" if self._is_closed else
                f"{ranks} after {timeout:g} s" if ranks else "the manager is not running: call start()"
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Write the blocks queued for SSD, cancel running transfers, free all memory. May be called again.

        Afterwards matches are empty, puts save nothing, and tasks that are launched are cancelled.
        """
        self._is_closed = True
        with ExitStack() as steps:               # last in, first out; each is called, whatever the others raise
            steps.callback(self.recorder.close)
            if self.metrics is not None:
                steps.callback(self.metrics.close)
            steps.callback(self._transfer.shutdown)
            if self._tiering is not None:
                steps.callback(self._tiering.shutdown)

    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """Forget all cached KV, as after a change of weights. Nothing put before it is ever returned after it,
        and nothing is pinned any more.

        Tasks that are matched or running are cancelled; ``timeout`` bounds the wait for them (seconds).
        ``new_weights``: the engine's weights are no longer those that ``ModelConfig`` names. KV that is put from now on
        is not offered after a restart. Hashers that were made before make keys of the old weights.
        """
        timeout = seconds_of(timeout, "timeout")
        if new_weights:
            self._domain = changed_domain(self._domain)
        if self._cache is not None:
            self._cache.reset()
        if self._tiering is not None:
            self._tiering.reset()
        self._tasks.wait(self._tasks.reset(), timeout, self._tasks.is_settled)

    def _keep_house(self) -> float:
        pause = self._tasks.keep_house()
        return min(pause, self._tiering.keep_house()) if self._tiering is not None else pause

    def _log_ready(self) -> None:
        """One line with all that is in effect: when every rank has registered, and the SSD tier has been opened."""
        config, pool = self._cache_config, self._transfer.host_pool
        metrics = self.metrics.port if self.metrics is not None else None
        logger.info("ready: %s", "; ".join(part for part in (
            f"host {pool.num_bytes / (1 << 30):.3g} GiB ({pool.num_slots} blocks of {self._tokens_per_block} tokens, "
            f"{pool.slot_bytes / (1 << 20):.3g} MiB each)",
            self._tiering.description if self._tiering is not None else "no SSD",
            "1 rank" if self._ranks == 1 else f"{self._ranks} ranks",
            f"eviction {config.eviction_policy}",
            f"metrics at http://{config.metrics_host}:{metrics}/metrics" if metrics else "no metrics",
            self._note,
        ) if part))

    def _on_capacity(self, num_slots: int) -> None:
        is_first = self._cache is None
        if self._cache is None:
            pool = self._transfer.host_pool
            config = self._cache_config
            self._cache = GlobalCacheEngine(
                pool.num_slots, self._make_policy, config.evict_start_threshold, config.evict_ratio,
                num_ssd_slots=config.ssd_bytes // pool.slot_bytes, quotas=self._quotas,
                max_pinned_share=config.max_pinned_share,
            )
        self._cache.grow(num_slots)
        self._transfer.notify()
        if self._tiering is not None:
            self._tiering.grow(self._cache, self._transfer, num_slots)
        elif is_first:
            self._log_ready()

    # ---- keys -------------------------------------------------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """A hasher of growing sequences whose keys this manager understands."""
        return SequenceHasher(self._seed(namespace), self._tokens_per_block)

    def _keys(
        self, tokens: ArrayLike, namespace: Sequence[str] | None, extras: Mapping[int, bytes] | None = None
    ) -> NDArray[np.uint64]:
        seed = self._seed(namespace)
        tokens, extras = tokens_of(tokens), extras_of(extras)
        try:
            return hash_blocks(tokens, self._tokens_per_block, seed, extras=extras)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"token_ids: {error}") from error

    def _seed(self, namespace: Sequence[str] | None) -> bytes:
        return self._chain_seed(self._domain, namespace_of(namespace), self._cache_config.secret)

    def group(self, namespace: Sequence[str] | None) -> int:
        """Which quota blocks of this namespace count against: a number that the methods below take as ``group``."""
        return self._quotas.group(namespace_of(namespace))

    # ---- pins -------------------------------------------------------------------------------------------------

    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """Keep the blocks of a prefix that are cached now, on any tier, until ``unpin`` or ``reset``.

        Pinned blocks do not expire. ``name`` is the argument of ``unpin``; empty: a name is generated.

        Raises
        ------
        PinError
            No block of the prefix is cached, the name is taken, or too many blocks would be pinned
            (``max_pinned_share``, or the guarantees of other namespaces).
        """
        if self._cache is None:
            raise PinError("no rank has registered yet, so nothing is cached: pin when the engine is up")
        return self._cache.pin(self._keys(token_ids, namespace), name, self.group(namespace))

    def unpin(self, name: str) -> Pin:
        """Release a pinned prefix: its blocks may be evicted again. PinError if no pin has that name."""
        if self._cache is None:
            raise PinError("nothing is pinned: no rank has registered yet")
        return self._cache.unpin(name)

    def pins(self) -> list[Pin]:
        """The pinned prefixes."""
        return self._cache.pins() if self._cache is not None else []

    def stats(self) -> dict[str, int]:
        """Counts of the index, of the SSD tier and of the tasks, now; of matches, by reason, since the start."""
        return {
            **(self._cache.stats() if self._cache is not None else {}),
            **(self._tiering.stats() if self._tiering is not None else {}),
            **self._counts.stats(),
            "tasks": len(self._tasks),
            "provisional_puts": self._tasks.num_provisional,
            "in_service": int(self._transfer.in_service),
        }

    def check_integrity(self) -> None:
        """Raise InvariantError if the index or the slots are not consistent."""
        if self._cache is not None:
            self._cache.check_integrity()
