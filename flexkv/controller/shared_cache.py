"""The part of a controller that its engines share: data plane, host pool, index, tiers and metrics of one pool."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.config import CacheConfig, TransferConfig, runtime_directory
from flexkv.config.numa import read_numa_nodes
from flexkv.controller.host_memory import HostMemory, MemoryShare
from flexkv.controller.listener import Listener, RankGroup
from flexkv.controller.pool_resizing import PoolResizing
from flexkv.controller.space import Space
from flexkv.controller.tasks.table import TaskTable
from flexkv.errors import FlexKVError
from flexkv.metrics.exporter import Metrics
from flexkv.metrics.request_trace import make_recorder
from flexkv.protocol.ring import OpKind
from flexkv.protocol.sockets import remove_dead_sockets
from flexkv.storage.ssd.gds_queue import GdsEnd
from flexkv.storage.store import TierKind
from flexkv.storage.tiers import tiers_of
from flexkv.transfer.engine import TransferEngine

logger = logging.getLogger("flexkv.controller")

_LOADS_AND_SAVES = frozenset(kind.name for kind in (OpKind.H2D, OpKind.D2H, OpKind.STORE2D, OpKind.D2STORE))


class SharedCache:
    """Data plane, host pool, index and tiers of one pool, for one or more engines. Thread safe.

    Parameters
    ----------
    cache_config, transfer_config
    domain : bytes
        Identity of everything that must be equal for KV to be comparable.
    labels : mapping
        Labels of the metrics: ``model_name`` and ``engine``.
    metrics_port : int
        0: any free port.
    tiers : sequence of TierKind, optional
        The tiers below host memory, the fastest first. Default: those of the configuration.
    ranks, note : str
        Parts of the line that the log gets when the cache is ready: its engine's ranks, in words, and the end.
    share : MemoryShare, optional
        The host pool grows and shrinks; default: its size is that of the configuration.

    Attributes
    ----------
    transfer : TransferEngine
    listener : Listener
    space : Space
    metrics : Metrics or None
        None: the setting ``enable_metrics`` is off.
    resizing : PoolResizing
    memory : HostMemory
    moved_blocks : int
        Blocks loaded and saved since the start.
    recorder : Recorder
        Of the trace of requests.
    """

    def __init__(
        self,
        cache_config: CacheConfig,
        transfer_config: TransferConfig,
        domain: bytes,
        labels: dict[str, str],
        metrics_port: int = 0,
        *,
        tiers: Sequence[TierKind] | None = None,
        ranks: str = "",
        note: str = "",
        share: MemoryShare | None = None,
    ) -> None:
        self._config = cache_config
        self._ranks, self._note, self._is_shared = ranks, note, share is not None
        self._tables: dict[TaskTable, Callable[[], float]] = {}         # of the engines
        self._num_clients = 0
        self._is_closed = self._has_logged_out_of_service = False
        self.moved_blocks = 0
        self.metrics = None
        if cache_config.enable_metrics:
            self.metrics = Metrics(self.stats, labels, cache_config.metrics_host, metrics_port)
        self.transfer = TransferEngine(
            transfer_config,
            on_capacity=self._on_capacity,
            housekeeping=self._run_background_work,
            observe=self._transfer_ended,
        )
        self.memory = HostMemory(
            cache_config.host_bytes, cache_config.num_cpu_blocks, cache_config.hugepage_bytes, share=share,
            numa_nodes=read_numa_nodes(cache_config.numa_nodes),
        )
        if share is not None:
            self.transfer.growth.may_lower()
        self.listener = Listener(
            transfer_config,
            self.transfer,
            self.memory,
            on_new_content=self.reset,
            on_gds=self._on_gds if cache_config.ssd_bytes and cache_config.enable_gds else None,
        )
        self.space = Space(
            cache_config, domain, self.transfer, tiers_of(cache_config) if tiers is None else tiers, self._log_ready
        )
        self.resizing = PoolResizing(self.memory, self.space, self.transfer.growth)
        self.recorder = make_recorder(cache_config)

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self, group: RankGroup | None = None, port: str = "") -> None:
        """Start the data plane, and listen for the ranks of ``group`` at ``port``. Raises as ``Listener.start``."""
        self.listener.start(group, port)
        with suppress(FlexKVError, OSError):     # of controllers that died
            remove_dead_sockets(runtime_directory())
        if self.metrics is not None:
            self.metrics.start()

    def shutdown(self) -> None:
        """Write the blocks queued for SSD, cancel running transfers, free all memory. May be called again."""
        self._is_closed = True
        with ExitStack() as steps:               # last in, first out; each is called, whatever the others raise
            steps.callback(self.recorder.close)
            if self.metrics is not None:
                steps.callback(self.metrics.close)
            steps.callback(self.transfer.shutdown)
            if self.space.tiering is not None:
                steps.callback(self.space.tiering.shutdown)

    @property
    def is_closed(self) -> bool:
        """Whether ``shutdown`` was called."""
        return self._is_closed

    @property
    def index(self) -> GlobalCacheEngine | None:
        """The index, while blocks can be moved."""
        if self._is_closed:
            return None
        if not self.transfer.in_service:
            if not self._has_logged_out_of_service:
                self._has_logged_out_of_service = True
                logger.error("the data plane is out of service: nothing is loaded or saved any more; see the log above")
            return None
        return self.space.index

    def _transfer_ended(self, kind: str, status: str, num_moved: int, seconds: float) -> None:
        if kind in _LOADS_AND_SAVES:
            self.moved_blocks += num_moved
        if self.metrics is not None:
            self.metrics.transfer_ended(kind, status, num_moved, seconds)

    def _on_capacity(self, num_slots: int) -> None:
        self.space.grow(self.listener.host_pool, num_slots)

    def _on_gds(self, end: GdsEnd) -> None:
        if self.space.tiering is not None:
            self.space.tiering.attach_gds(end)

    def _run_background_work(self) -> float:
        pause = self.space.run_background_work()
        for table, after_turn in list(self._tables.items()):
            pause = min(pause, table.run_background_work(), after_turn())
        return pause

    def _log_ready(self) -> None:
        """One line with all that is in effect: when every rank has registered, and the lower tiers have been opened."""
        config, pool, tiering = self._config, self.listener.host_pool, self.space.tiering
        metrics = self.metrics.port if self.metrics is not None else None
        logger.info("ready: %s", "; ".join(part for part in (
            f"host {'up to ' * self._is_shared}{pool.num_bytes / (1 << 30):.3g} GiB ({pool.num_slots} blocks of "
            f"{config.tokens_per_block} tokens, {pool.slot_bytes / (1 << 20):.3g} MiB each)",
            tiering.description if tiering is not None else "no SSD",
            self._ranks,
            f"eviction {config.eviction_policy}",
            f"metrics at http://{config.metrics_host}:{metrics}/metrics" if metrics else "no metrics",
            self._note,
        ) if part))

    # ---- engines ----------------------------------------------------------------------------------------------

    def new_client(self) -> int:
        """A number for an engine, which no other engine gets."""
        self._num_clients += 1
        return self._num_clients - 1

    def join(self, tasks: TaskTable, after_turn: Callable[[], float] | None = None) -> None:
        """Add an engine. ``after_turn()`` is called on the background thread whenever something has happened; it
        returns the time in seconds after which the next call is needed."""
        self._tables[tasks] = after_turn or (lambda: math.inf)

    def leave(self, tasks: TaskTable) -> None:
        """Forget an engine, which has no tasks any more."""
        self._tables.pop(tasks, None)

    @property
    def num_engines(self) -> int:
        """Number of engines."""
        return len(self._tables)

    def reset(self) -> None:
        """Forget all cached KV, and cancel the tasks of all engines."""
        self.space.reset()
        for table in list(self._tables):
            table.reset()

    def stats(self) -> dict[str, int]:
        """Counts of the index and the lower tiers, now; of matches, by reason, since the start; of tasks, now."""
        tables = list(self._tables)
        return {
            **self.space.stats(),
            "tasks": sum(map(len, tables)),
            "provisional_puts": sum(table.num_provisional for table in tables),
            "in_service": int(self.transfer.in_service),
        }
