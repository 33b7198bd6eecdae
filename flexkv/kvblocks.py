"""KV by blocks: wires index, data plane and tasks together. ``KVManager`` adds what upstream's adapters call."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.hashing import SequenceHasher, chain_seed, hash_blocks
from flexkv.at_exit import close_at_exit
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import policy_class
from flexkv.cache.match_counts import MatchCounts
from flexkv.cache.pins import Pin
from flexkv.cache.plan import NOTHING, MatchResult
from flexkv.cache.quotas import Quotas
from flexkv.cache.trace import make_recorder
from flexkv.config import CacheConfig, ModelConfig, TransferConfig, domain, load_config, runtime_directory
from flexkv.errors import ConfigError, NotReadyError, PinError
from flexkv.metrics.exporter import Metrics
from flexkv.response import KVResponse
from flexkv.tasks.arguments import block_of, task_ids_of
from flexkv.tasks.table import TaskTable
from flexkv.tiering import Tiering, make_ssd_store
from flexkv.transfer.control import Control
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.ssd import MakeStore

logger = logging.getLogger("flexkv.manager")


class KVBlocks:
    """Loads and saves the KV of token sequences for one engine (one data-parallel client).

    Never blocks on a transfer except in ``wait`` and ``shutdown``. Before every rank has registered its tensors,
    matches are empty and puts write nothing. Thread safe.

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
        ranks = model_config.tp_size * model_config.pp_size
        if cache_config.enable_gds and ranks > 1:
            raise ConfigError("enable_gds", True, f"goes with one rank in this version, there are {ranks}: turn it off")
        self._counts = MatchCounts()
        self.metrics = self._make_metrics(model_config, cache_config, dp_client_id)
        self._cache: GlobalCacheEngine | None = None
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
        close_at_exit(self, type(self).shutdown)
        if self.metrics is not None:
            self.metrics.start()

    def is_ready(self) -> bool:
        """Whether every rank has registered, so that KV can be loaded and saved."""
        return self._transfer.is_ready and self._cache is not None

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
        if not self._transfer.wait(self.is_ready, timeout if self._transfer.describe_ranks() else 0.0):
            ranks = self._transfer.describe_ranks()
            raise NotReadyError(f"{ranks} after {timeout:g} s" if ranks else "the manager is not running: call start()")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Write what is queued for SSD, cancel what is under way, give all that it holds back. May be repeated."""
        if self._tiering is not None:
            self._tiering.shutdown()
        self._transfer.shutdown()
        if self.metrics is not None:
            self.metrics.close()
        self.recorder.close()

    def reset(self, timeout: float = 5.0) -> None:
        """Forget all cached KV, as after a change of weights. Nothing put before it is ever returned after it,
        and nothing is pinned any more.

        Tasks that are matched or running are cancelled; ``timeout`` bounds the wait for them (seconds).
        """
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

    # ---- blocks: the API that this package's adapters use ------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """A hasher of growing sequences whose keys this manager understands."""
        seed = chain_seed(self._domain, tuple(namespace or ()), self._cache_config.secret)
        return SequenceHasher(seed, self._tokens_per_block)

    def _keys(
        self, tokens: NDArray[np.integer], namespace: Sequence[str] | None, extras: Mapping[int, bytes] | None
    ) -> NDArray[np.uint64]:
        seed = chain_seed(self._domain, tuple(namespace or ()), self._cache_config.secret)
        return hash_blocks(tokens, self._tokens_per_block, seed, extras=extras)

    def group(self, namespace: Sequence[str] | None) -> int:
        """Which quota blocks of this namespace count against: a number that the methods below take as ``group``."""
        return self._quotas.group(namespace)

    def lookup(
        self, keys: NDArray[np.uint64], start_block: int = 0, group: int = 0, count: bool = False
    ) -> MatchResult:
        """How many leading blocks of ``keys`` ((n, 2) uint64) can be loaded, why no more, since when. Holds nothing.

        ``start_block``: those before it are not to be loaded. ``count``: in ``stats``, by reason; once a request.
        """
        match = self._cache.match(keys, start_block, group) if self._cache is not None else NOTHING
        if count:
            self._counts.count(match, start_block, len(keys))
        return match

    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, group: int = 0,
    ) -> int:
        """Load blocks ``[start_block, start_block + len(pages))`` of a sequence into ``pages``.

        A block that is not ready fails, and with it the task; the others are loaded. ``layerwise``: for
        ``KVTPClient.follow_load``; what is not in host memory fails, for later loads must not pass this one.
        """
        task = self._tasks.new_get(
            self._cache, keys, start_block, start_block + len(pages), 0, host_only=layerwise, group=group
        )
        self._tasks.run(task, pages, fence, layerwise)
        return task.task_id

    def prefetch_blocks(self, keys: NDArray[np.uint64], start_block: int = 0, group: int = 0) -> int | None:
        """Bring blocks of a sequence from there on into host memory; the task ends when they are there. None: too much
        is being brought there already."""
        if self._fetches_enough():
            return None
        return self._tasks.prefetch(self._cache, keys, 0, start_block, group)

    def _fetches_enough(self) -> bool:
        return self._tiering is not None and self._tiering.fetches_enough

    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0, group: int = 0,
        *, provisional: bool = False, after: Iterable[int] = (),
    ) -> int | None:
        """Save the absent blocks of ``[start_block, start_block + len(pages))``; None if none is absent.

        A put with the status TIMEOUT or CANCELLED, and a put whose rank was lost, saves nothing.

        Parameters
        ----------
        keys : (n, 2) uint64
            The sequence from its first block.
        start_block : int
        pages : (m,) int32
            Page of each block from ``start_block`` on.
        fence : int
            Step of the ranks before which the pages must not be read; 0: none.
        group : int
            As ``group`` returns it.
        provisional : bool
            The blocks stay invisible, and are not written to SSD, until ``accept_put``. If that does not come within
            ``op_timeout_s`` after the copies are at rest, they are dropped.
        after : iterable of int
            Ids of loads of which every block must have succeeded; otherwise all blocks of this put fail.
        """
        task = self._tasks.new_put(
            self._cache, keys, start_block, start_block + len(pages), 0, group, provisional
        )
        if len(task.blocks) == 0:
            self._tasks.discard(task)
            return None
        self._tasks.run(task, pages[task.blocks - start_block], fence, after=task_ids_of(after))
        return task.task_id

    def accept_put(self, task_id: int, stop_block: int | None = None) -> None:
        """The engine accepted the step that computed the blocks of a provisional put, so they may be offered.

        May be called before and after the copies are at rest, and after the result was taken. The first call decides;
        an unknown id is ignored.

        Parameters
        ----------
        task_id : int
        stop_block : int, optional
            Blocks at this position of the sequence and behind it are dropped. None: no block; 0: all.
        """
        [task] = task_ids_of(task_id)
        self._tasks.accept(task, math.inf if stop_block is None else block_of(stop_block, "stop_block"))

    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """Positions in its sequence of the blocks that a running task moves."""
        return self._tasks.blocks(task_id)

    def task_match(self, task_id: int) -> MatchResult | None:
        """What a get found when it was made: how many blocks, why no more, and since when; None: it is not known."""
        return self._tasks.match(task_id)

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """How fast the engine computes prompts, as its adapter measures it; the configuration's rate wins."""
        if self._tiering is not None:
            self._tiering.set_prefill_rate(tokens_per_s)

    # ---- pins -------------------------------------------------------------------------------------------------

    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """Keep the blocks of a prefix that are cached now, on any tier, until ``unpin`` or ``reset``.

        They do not expire. ``name``: to unpin it by; empty: made up.

        Raises
        ------
        PinError
            Nothing of it is cached, the name is taken, or too much would be pinned (``max_pinned_share``, or what is
            guaranteed to other namespaces).
        """
        if self._cache is None:
            raise PinError("no rank has registered yet, so nothing is cached: pin when the engine is up")
        return self._cache.pin(self._keys(np.asarray(token_ids), namespace, None), name, self.group(namespace))

    def unpin(self, name: str) -> Pin:
        """Let a pinned prefix go when its turn comes; PinError if there is none of that name."""
        if self._cache is None:
            raise PinError("nothing is pinned: no rank has registered yet")
        return self._cache.unpin(name)

    def pins(self) -> list[Pin]:
        """What is pinned."""
        return self._cache.pins() if self._cache is not None else []

    # ---- results ----------------------------------------------------------------------------------------------

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for tasks, at most ``timeout`` seconds; a result is given once.

        ``completely`` waits, after a transfer was reported late or cancelled, until nothing touches its pages.
        """
        ids = task_ids_of(task_ids)
        self._tasks.wait(ids, timeout, self._tasks.is_settled if completely else self._tasks.has_result)
        return {task_id: self._tasks.take(task_id) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """Results of those of the tasks that have ended, without waiting; a result is given once."""
        ids = task_ids_of(task_ids)
        self._transfer.poll()
        return {task_id: self._tasks.take(task_id) for task_id in ids if self._tasks.is_settled(task_id)}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Stop tasks: what has not started never will; what is being copied now is finished first (see ``wait``)."""
        for task_id in task_ids_of(task_ids):
            self._tasks.cancel(task_id)

    def stats(self) -> dict[str, int]:
        """Counts of the index, of the SSD tier and of the tasks, now; of matches, by reason, since the start."""
        return {
            **(self._cache.stats() if self._cache is not None else {}),
            **(self._tiering.stats() if self._tiering is not None else {}),
            **self._counts.stats(),
            "tasks": len(self._tasks),
        }

    def check_integrity(self) -> None:
        """Raise InvariantError if the index or the slots are not consistent."""
        if self._cache is not None:
            self._cache.check_integrity()
