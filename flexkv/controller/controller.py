"""The controller: one engine's space, data plane and ranks, wired together."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher
from flexkv.at_exit import close_at_exit
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import NO_MATCH, MatchResult
from flexkv.config import CacheConfig, ModelConfig, TransferConfig, domain, runtime_directory
from flexkv.controller.blocks import Blocks
from flexkv.controller.listener import Listener
from flexkv.controller.requests import Control
from flexkv.controller.response import KVResponse
from flexkv.controller.space import Space
from flexkv.controller.tasks.arguments import (
    block_of,
    keys_of,
    number_of,
    pages_of,
    seconds_of,
    span_of,
    task_id_of,
    task_ids_of,
    unique_task_ids_of,
)
from flexkv.errors import ArgumentError, ConfigError, FlexKVError, NotReadyError, PinError, SlotMappingError
from flexkv.metrics.exporter import Metrics
from flexkv.metrics.request_trace import make_recorder
from flexkv.protocol.layer_signals import MAX_COUNTERS
from flexkv.protocol.numbers import fence_of, integer_of
from flexkv.protocol.requests import Pin
from flexkv.protocol.sockets import remove_dead_sockets
from flexkv.storage.ssd.gds_queue import GdsEnd
from flexkv.storage.store import TierKind
from flexkv.storage.tiers import tiers_of
from flexkv.transfer.engine import TransferEngine

logger = logging.getLogger("flexkv.controller")


class Controller(Blocks):
    """Implements ``Blocks`` for one engine, in this process.

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
        self._cache_config = cache_config
        ranks = model_config.tp_size * model_config.pp_size
        if cache_config.enable_gds and ranks > 1:
            raise ConfigError(
                "enable_gds", True, f"supports one rank in this version; this model has {ranks}: turn it off"
            )
        self._ranks = ranks
        self._note = note
        self._is_closed = self._has_logged_out_of_service = False
        default_port = f"ipc://{runtime_directory()}/register-{dp_client_id}.sock"
        port = gpu_register_port or transfer_config.gpu_register_port or default_port
        self.metrics = self._make_metrics(model_config, cache_config, dp_client_id)
        self._transfer = TransferEngine(
            transfer_config,
            ranks=ranks,
            on_capacity=self._on_capacity,
            housekeeping=self._run_background_work,
            observe=self.metrics.transfer_ended if self.metrics is not None else None,
        )
        self._listener = Listener(
            transfer_config.replace(gpu_register_port=port),
            self._transfer,
            host_bytes=cache_config.host_bytes,
            num_slots=cache_config.num_cpu_blocks,
            ranks=ranks,
            dp_client_ids=(dp_client_id,),
            hugepage_bytes=cache_config.hugepage_bytes,
            on_control=Control(self.pin, self.unpin, self.pins).answer,
            on_gds=self._on_gds if cache_config.ssd_bytes and cache_config.enable_gds else None,
        )
        self._space = Space(
            cache_config, domain(model_config, cache_config), self._transfer, dp_client_id,
            transfer_config.op_timeout_s, tiers_of(cache_config) if tiers is None else tiers, self._log_ready,
        )
        self._recorder = make_recorder(cache_config)

    def _make_metrics(self, model_config: ModelConfig, config: CacheConfig, dp_client_id: int) -> Metrics | None:
        if not config.enable_metrics:
            return None
        labels = {"model_name": model_config.model_id, "engine": str(dp_client_id)}
        port = config.py_metrics_port and config.py_metrics_port + dp_client_id
        return Metrics(self.stats, labels, config.metrics_host, port)

    def _on_capacity(self, num_slots: int) -> None:
        self._space.grow(self._listener.host_pool, num_slots)

    def _run_background_work(self) -> float:
        return self._space.run_background_work()

    def _on_gds(self, end: GdsEnd) -> None:
        if self._space.tiering is not None:
            self._space.tiering.attach_gds(end)

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See ``Blocks``. The host pool is made when all ranks have registered."""
        self._listener.start()
        with suppress(FlexKVError, OSError):     # of controllers that died
            remove_dead_sockets(runtime_directory())
        close_at_exit(self, type(self).shutdown)
        if self.metrics is not None:
            self.metrics.start()

    def is_ready(self) -> bool:
        """See ``Blocks``."""
        return self._listener.is_ready and self._index is not None

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
        return self._space.index

    def wait_ready(self, timeout: float = 60.0) -> None:
        """See ``Blocks``."""
        timeout = seconds_of(timeout, "timeout")
        self._transfer.wait(
            lambda: self.is_ready() or self._is_closed or not self._transfer.in_service,
            timeout if self._listener.describe_ranks() else 0.0,
        )
        if not self.is_ready():
            ranks = self._listener.describe_ranks()
            raise NotReadyError(
                "the data plane is out of service: see the log" if not self._transfer.in_service else
                "the manager was shut down" if self._is_closed else
                f"{ranks} after {timeout:g} s" if ranks else "the manager is not running: call start()"
            )

    def shutdown(self) -> None:
        """See ``Blocks``."""
        self._is_closed = True
        with ExitStack() as steps:               # last in, first out; each is called, whatever the others raise
            steps.callback(self._recorder.close)
            if self.metrics is not None:
                steps.callback(self.metrics.close)
            steps.callback(self._transfer.shutdown)
            if self._space.tiering is not None:
                steps.callback(self._space.tiering.shutdown)

    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """See ``Blocks``."""
        self._space.reset(seconds_of(timeout, "timeout"), new_weights)

    def _log_ready(self) -> None:
        """One line with all that is in effect: when every rank has registered, and the SSD tier has been opened."""
        config, pool, tiering = self._cache_config, self._listener.host_pool, self._space.tiering
        metrics = self.metrics.port if self.metrics is not None else None
        logger.info("ready: %s", "; ".join(part for part in (
            f"host {pool.num_bytes / (1 << 30):.3g} GiB ({pool.num_slots} blocks of {config.tokens_per_block} tokens, "
            f"{pool.slot_bytes / (1 << 20):.3g} MiB each)",
            tiering.description if tiering is not None else "no SSD",
            "1 rank" if self._ranks == 1 else f"{self._ranks} ranks",
            f"eviction {config.eviction_policy}",
            f"metrics at http://{config.metrics_host}:{metrics}/metrics" if metrics else "no metrics",
            self._note,
        ) if part))

    # ---- keys -------------------------------------------------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """See ``Blocks``."""
        return self._space.hasher(namespace)

    def keys(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None = None,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> NDArray[np.uint64]:
        """See ``Blocks``."""
        return self._space.keys(token_ids, namespace, block_extras)

    def tenant(self, namespace: Sequence[str] | None) -> int:
        """See ``Blocks``."""
        return self._space.tenant(namespace)

    def _tenant_of(self, tenant: int) -> int:
        return integer_of(tenant, "tenant", 0, self._space.num_tenants - 1)

    def _length_of(self, num_tokens: int, keys: NDArray[np.uint64]) -> int:
        """A number of tokens of which the whole blocks have these keys; else ArgumentError."""
        shortest = len(keys) * self._cache_config.tokens_per_block
        return integer_of(num_tokens, "num_tokens", shortest, shortest + self._cache_config.tokens_per_block - 1)

    # ---- matching ---------------------------------------------------------------------------------------------

    def record_request(self, keys: NDArray[np.uint64]) -> None:
        """See ``Blocks``."""
        self._recorder.record(keys_of(keys))

    def lookup(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, count: bool = False
    ) -> MatchResult:
        """See ``Blocks``."""
        keys, start_block, tenant = keys_of(keys), block_of(start_block, "start_block"), self._tenant_of(tenant)
        index = self._index
        match = index.match(keys, start_block, tenant) if index is not None else NO_MATCH
        if count:
            self._space.counts.count(match, start_block, len(keys))
        return match

    def match_get(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0, host_only: bool = False
    ) -> tuple[int, NDArray[np.int32]]:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), self._tenant_of(tenant)
        num_tokens, space = self._length_of(num_tokens, keys), self._space
        self._recorder.record(keys)
        task = space.tasks.new_get(self._index, keys, start, None, num_tokens, host_only=bool(host_only), tenant=tenant)
        space.tasks.hold(task)
        space.counts.count(task.match, start, len(keys))
        return task.task_id, task.blocks

    def match_put(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0
    ) -> tuple[int, NDArray[np.int32]]:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), self._tenant_of(tenant)
        num_tokens, tasks = self._length_of(num_tokens, keys), self._space.tasks
        task = tasks.new_put(self._index, keys, start, len(keys), num_tokens, tenant)
        tasks.hold(task)
        return task.task_id, task.blocks

    def launch(
        self, task_ids: int | Iterable[int], pages: Sequence[NDArray[np.int32]], fence: int = 0,
        layerwise: bool = False, counter: int = 0,
    ) -> list[int]:
        """See ``Blocks``."""
        ids, fence, counter = task_ids_of(task_ids), fence_of(fence), integer_of(counter, "counter", 0, MAX_COUNTERS)
        if layerwise and len(ids) != 1:
            raise ArgumentError(f"a launch layer by layer of {len(ids)} tasks: launch one task at a time")
        if len(ids) != len(pages):
            raise SlotMappingError(f"{len(pages)} slot mappings for {len(ids)} tasks: give one for each")
        tasks, launches = self._space.tasks, []
        for task_id, given in zip(ids, pages, strict=True):
            task, mapped = tasks.matched(task_id), pages_of(given)
            if len(task.blocks) != len(mapped):
                raise SlotMappingError(
                    f"task {task_id} moves {len(task.blocks)} blocks of {task.tokens_per_block} tokens; "
                    f"its slot mapping has {len(mapped)}: give one slot for each True of the mask"
                )
            launches.append((task, mapped))
        tasks.launch(launches, fence, bool(layerwise), counter)
        return ids

    # ---- gets and puts in one call ----------------------------------------------------------------------------

    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, tenant: int = 0,
    ) -> int:
        """See ``Blocks``."""
        keys, start, pages = span_of(keys, start_block, pages)
        fence, tenant, tasks = fence_of(fence), self._tenant_of(tenant), self._space.tasks
        task = tasks.new_get(self._index, keys, start, start + len(pages), 0, host_only=bool(layerwise), tenant=tenant)
        tasks.run(task, pages, fence, bool(layerwise))
        return task.task_id

    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0, tenant: int = 0,
        *, provisional: bool = False, after: Iterable[int] = (),
    ) -> int | None:
        """See ``Blocks``."""
        keys, start, pages = span_of(keys, start_block, pages)
        fence, tenant, loads, tasks = fence_of(fence), self._tenant_of(tenant), task_ids_of(after), self._space.tasks
        task = tasks.new_put(self._index, keys, start, start + len(pages), 0, tenant, bool(provisional))
        if len(task.blocks) == 0:
            tasks.discard(task)
            return None
        tasks.run(task, pages[task.blocks - start], fence, after=loads)
        return task.task_id

    def accept_put(self, task_id: int, stop_block: int | None = None) -> None:
        """See ``Blocks``."""
        stop = math.inf if stop_block is None else block_of(stop_block, "stop_block")
        self._space.tasks.accept(task_id_of(task_id), stop)

    def prefetch_blocks(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, *, num_tokens: int = 0,
        must_answer: bool = False,
    ) -> int | None:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), self._tenant_of(tenant)
        num_tokens = self._length_of(num_tokens, keys) if num_tokens else 0
        tiering = self._space.tiering
        is_busy = tiering is not None and tiering.promotes_enough
        if is_busy and not must_answer:
            return None
        return self._space.tasks.prefetch(self._index, keys, num_tokens, start, tenant, host_only=is_busy)

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """See ``Blocks``."""
        self._space.set_prefill_rate(number_of(tokens_per_s, "tokens_per_s", 0.0, 1e12))

    # ---- tasks ------------------------------------------------------------------------------------------------

    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """See ``Blocks``."""
        return self._space.tasks.blocks(task_id_of(task_id))

    def task_match(self, task_id: int) -> MatchResult | None:
        """See ``Blocks``."""
        return self._space.tasks.match(task_id_of(task_id))

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """See ``Blocks``."""
        ids, tasks = unique_task_ids_of(task_ids), self._space.tasks
        tasks.wait(ids, seconds_of(timeout, "timeout"), tasks.is_settled if completely else tasks.has_result)
        return {task_id: tasks.take(task_id) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """See ``Blocks``."""
        ids, tasks = unique_task_ids_of(task_ids), self._space.tasks
        self._transfer.poll()
        return {task_id: tasks.take(task_id) for task_id in ids if tasks.is_settled(task_id)}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """See ``Blocks``."""
        for task_id in task_ids_of(task_ids):
            self._space.tasks.cancel(task_id)

    # ---- pins and counts --------------------------------------------------------------------------------------

    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """See ``Blocks``."""
        index = self._space.index
        if index is None:
            raise PinError("no rank has registered yet, so nothing is cached: pin when the engine is up")
        return index.pin(self.keys(token_ids, namespace), name, self.tenant(namespace))

    def unpin(self, name: str) -> Pin:
        """See ``Blocks``."""
        index = self._space.index
        if index is None:
            raise PinError("nothing is pinned: no rank has registered yet")
        return index.unpin(name)

    def pins(self) -> list[Pin]:
        """See ``Blocks``."""
        index = self._space.index
        return index.pins() if index is not None else []

    def stats(self) -> dict[str, int]:
        """See ``Blocks``."""
        return {**self._space.stats(), "in_service": int(self._transfer.in_service)}

    def check_integrity(self) -> None:
        """See ``Blocks``."""
        if self._space.index is not None:
            self._space.index.check_integrity()
