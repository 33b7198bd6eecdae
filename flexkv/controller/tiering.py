"""Traffic between host memory and SSD: fetches for gets, and write-backs behind puts. Wires index and data plane."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.io_queue import IoQueue
from flexkv.cache.admission.load_or_compute import LoadOrCompute
from flexkv.cache.admission.write_back import WriteBack
from flexkv.cache.early_traffic import EarlyTraffic
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import DirectPlan, FetchPlan, GetPlan, PutPlan, WritePlan
from flexkv.cache.tier import SsdTier
from flexkv.config import CacheConfig
from flexkv.errors import FlexKVError
from flexkv.protocol.ring import OpKind
from flexkv.storage.host_pool import HostPool
from flexkv.storage.recovered import Recovered
from flexkv.storage.ssd.gds_queue import GdsEnd, GdsQueue
from flexkv.storage.ssd.store import SsdStore
from flexkv.storage.store import MakeStore, Store
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.executors.store import StoreExecutor
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp

logger = logging.getLogger("flexkv.controller")

_BATCH_BYTES = 32 << 20
"""Written as one op: enough for large writes, and little for a read to wait behind."""

_IN_FLIGHT_BYTES = 128 << 20
"""Written at a time: as many host slots are pinned for it."""

_QUEUE_SHARE = 2
"""At most 1/2 of the host slots may wait for write-back; a block evicted before its turn is lost. Not less, because a
long prompt is queued as a whole."""

_WRITE_SHARE = 4
"""At most 1/4 of the host slots are written at a time: a slow disk must leave room for loads and saves."""

_FETCH_SHARE = 4
"""No prefetch begins while 1/4 of the host slots are being read into: running requests need room."""

_IDLE_S = 1.0
"""Between two looks at the queue when nothing happens."""

_DRAIN_S = 30.0
"""Time that a shutdown waits for the store to open and for the queue to be written."""


class Tiering:
    """The SSD tier of a manager.

    Until the store is open, which takes a while, and if it cannot be opened, everything works as without it.

    Parameters
    ----------
    config : CacheConfig
    domain : bytes
        What makes KV comparable; blocks of other domains on the same disks are not seen.
    make_store : callable
        ``make_store(config, slot_bytes, domain, memory) -> Store``.
    on_opened : callable
        Called once, when the store is open or cannot be opened.

    Attributes
    ----------
    description : str
        The tier in the words of the log, when ``on_opened`` is called.
    """

    def __init__(
        self, config: CacheConfig, domain: bytes, make_store: MakeStore, on_opened: Callable[[], None] = lambda: None
    ) -> None:
        self.description = "SSD not in service"
        self._on_opened = on_opened
        self._config = config
        self._domain = domain
        self._make_store = make_store
        self._write_lock = threading.RLock()   # from a plan to write until it is submitted; taken before any other
        self._lock = threading.Lock()          # taken before the index's and the data plane's
        self._fetch_ops: dict[int, TransferOp] = {}
        self._writes: set[int] = set()
        self._usable_slots = 0
        self._prefill_tokens_per_s = config.prefill_tokens_per_s
        self._load_or_compute: LoadOrCompute | None = None
        self._flush = self._is_over = False    # a shutdown writes without the rate limit; then nothing more is written
        self._uncleared = False                # there was a reset, and the store was not told, or could not be
        self._transfer: TransferEngine | None = None
        self._store: Store | None = None
        self._gds: GdsEnd | None = None     # of a rank, until the store is open
        self._writer: WriteBack | None = None
        self._early: EarlyTraffic | None = EarlyTraffic()     # None: the store cannot be opened
        self._thread: threading.Thread | None = None

    # ---- life -------------------------------------------------------------------------------------------------

    def grow(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool, num_slots: int) -> None:
        """Record that the pool has ``num_slots`` usable slots. The first call opens the store in the background."""
        with self._lock:
            if self._thread is None:
                self._transfer = transfer
                self._thread = threading.Thread(
                    target=self._open, args=(cache, transfer, pool), name="flexkv-ssd", daemon=True
                )
                self._thread.start()
            self._usable_slots = num_slots
            store = self._store
        if store is not None:
            store.register(num_slots * store.slot_bytes)

    def _open(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool) -> None:
        try:
            with memoryview(pool.memory):                    # stays mapped, also if the manager does not wait for this
                self._bring_up(cache, transfer, pool)
        except Exception as error:
            expected = isinstance(error, (FlexKVError, OSError))
            logger.error("the SSD tier is not in service: %s", error, exc_info=not expected)
            with self._lock:
                self._early = None
        self._on_opened()

    def attach_gds(self, end: GdsEnd) -> None:
        """A rank can be told to move blocks between SSD and its GPU, over this socket, which is owned by this now."""
        with self._lock:
            if self._gds is not None:
                self._gds.close()
            self._gds = end
        self._connect_gds()

    def _connect_gds(self) -> None:
        with self._lock:
            if self._store is None or self._gds is None:
                return
            end, self._gds = self._gds, None
            self._store.attach_device(partial(GdsQueue, end))

    def _bring_up(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool) -> None:
        start, identity = time.monotonic(), b"\0".join([self._domain, self._config.secret, pool.content])
        store = self._make_store(self._config, pool.slot_bytes, hashlib.sha256(identity).digest(), pool.memory)
        try:
            found = store.recover()
            is_wanted = transfer.add_executor(StoreExecutor(store))
        except BaseException:
            store.close()
            raise
        if not is_wanted:
            store.close()
            return
        count = self._index(cache, store, found)
        logger.info("SSD tier: %d slots, %d blocks found, %.2f s", store.num_slots, count, time.monotonic() - start)
        self.description = f"SSD {self._config.ssd_cache_gb:g} GiB ({store.num_slots} blocks, {count} found)"
        blocks = max(1, _BATCH_BYTES // pool.slot_bytes)
        writer = WriteBack(
            cache,
            write_all=self._config.ssd_admission == "all",
            batch_blocks=blocks,
            max_in_flight_blocks=max(1, min(
                max(blocks, _IN_FLIGHT_BYTES // pool.slot_bytes), pool.num_slots // _WRITE_SHARE
            )),
            max_queued_blocks=max(blocks, pool.num_slots // _QUEUE_SHARE),
            blocks_per_s=self._config.ssd_write_mb_per_s * (1 << 20) / pool.slot_bytes,
            clock=time.monotonic,
        )
        with self._lock:
            self._writer = writer
        self._wake()

    def _index(self, cache: GlobalCacheEngine, store: Store, found: Recovered) -> int:
        """Put what is on the disks into the index, parents before children; give back the rest of its slots."""
        indexed = np.zeros(len(found), dtype=np.bool_)
        load_or_compute = LoadOrCompute(
            self._config.load_policy, store.slot_bytes, self._config.tokens_per_block,
            0.0, time.monotonic,
        )

        def sequences() -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int32]]]:
            for path in found.paths():
                yield found.keys[path], np.where(indexed[path], np.int32(-1), found.slots[path])
                indexed[path] = True

        with self._write_lock:
            with self._lock:
                self._store, usable_slots, is_stale = store, self._usable_slots, self._uncleared
                self._load_or_compute = load_or_compute
                load_or_compute.prefill_tokens_per_s = self._prefill_tokens_per_s
            if is_stale:
                self._clear(store)
        store.register(usable_slots * store.slot_bytes)
        self._connect_gds()
        tier = SsdTier(store.slots, load_or_compute, self._usable, store.usable_slots)
        try:
            cache.attach_ssd(tier, () if is_stale else sequences())
        finally:
            cache.free_ssd(found.slots[~indexed])
        return int(indexed.sum())

    def _usable(self) -> bool:
        store = self._store
        return store is not None and not self._uncleared and store.usable()

    def reset(self) -> None:
        """Forget what is on SSD, and what is on its way there; the index was reset already."""
        with self._write_lock:
            with self._lock:
                self._uncleared = True
                store, writes = self._store, list(self._writes)
                if self._early is not None:
                    self._early.clear()
            if self._writer is not None:
                self._writer.clear()
            if store is not None and self._transfer is not None:
                for task_id in writes:
                    self._transfer.cancel(task_id)
                self._clear(store)
        self._wake()

    def _clear(self, store: Store) -> None:
        """Have the disks forget what they hold; out of service until that is done."""
        try:
            store.clear()
            self._uncleared = False
        except (FlexKVError, OSError) as error:
            logger.error("the SSD tier is out of service until a reset succeeds: %s", error)

    def shutdown(self) -> None:
        """Write what is queued, for a bounded time. The store is closed by the data plane."""
        with self._lock:
            gds, self._gds = self._gds, None
        if gds is not None:
            gds.close()
        if self._thread is None or self._transfer is None or self._is_over:
            return
        deadline = time.monotonic() + _DRAIN_S
        self._thread.join(_DRAIN_S)
        if self._thread.is_alive():
            logger.warning("the SSD tier has not opened within %g s; it closes when it has", _DRAIN_S)
        writer = self._writer
        if writer is not None and self._may_write:
            self._flush = True
            self._transfer.wake()
            left_s = max(0.0, deadline - time.monotonic())
            if not self._transfer.wait(lambda: writer.idle and self._num_early() == 0, left_s):
                logger.warning(
                    "not all was written to SSD within %g s: %d blocks are not there after a restart", _DRAIN_S,
                    writer.num_unwritten() + self._num_early(),
                )
        self._is_over = True

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """How fast the engine computes prompts, as measured. A rate that is set in the configuration stays."""
        if self._config.prefill_tokens_per_s:
            return
        with self._lock:
            self._prefill_tokens_per_s = tokens_per_s
            if self._load_or_compute is not None:
                self._load_or_compute.prefill_tokens_per_s = tokens_per_s

    # ---- gets -------------------------------------------------------------------------------------------------

    def begin_get(
        self, cache: GlobalCacheEngine, keys: NDArray[np.uint64], start: int, stop: int, choose: bool, host_only: bool,
        tenant: int = 0,
    ) -> tuple[GetPlan, tuple[Dependency, ...]]:
        """``cache.begin_get``, and start to read what has to be read; the blocks of the plan wait as told."""
        with self._lock:
            plan = cache.begin_get(keys, start, stop, choose, host_only, tenant, self.loads_directly)
            if plan.fetch is not None:
                self._fetch_ops[plan.fetch.fetch_id] = _fetch_op(plan.fetch)
            needs = tuple(Dependency(self._fetch_ops[join.fetch_id], join.mine, join.theirs) for join in plan.joins)
            graph = None
            if plan.fetch is not None and self._transfer is not None:
                graph = TransferGraph(next(self._transfer.task_ids), [self._fetch_ops[plan.fetch.fetch_id]])
        if graph is not None and plan.fetch is not None and self._transfer is not None:
            self._transfer.submit(graph, partial(self._fetched, cache, plan.fetch), background=True)
        if plan.stop > 0 and self._news(plan.keys):
            self._wake()
        return plan, needs

    @property
    def loads_directly(self) -> bool:
        """Gets read what is on SSD alone straight into the pages of the GPU."""
        return self._store is not None and self._store.device_is_ready

    @property
    def fetches_enough(self) -> bool:
        """So much is being read into host memory that no prefetch should begin."""
        with self._lock:
            return sum(len(op) for op in self._fetch_ops.values()) * _FETCH_SHARE >= self._usable_slots

    @property
    def saves_directly(self) -> bool:
        """Puts for which there are too few host slots write straight from the pages of the GPU. Not where SSD is
        choosy: of what is written so, nothing is known yet."""
        return self.loads_directly and self._config.ssd_admission == "all"

    def end_direct_get(self, cache: GlobalCacheEngine, plan: DirectPlan, ok: NDArray[np.bool_] | None) -> None:
        """Reads of blocks have ended, ``ok`` ((m,) bool) or not; None: they were not begun."""
        if ok is None or self._store is None:
            cache.end_direct_get(plan, None, np.zeros(len(plan), dtype=np.bool_))
            return
        lost = ~ok                               # or cancelled, and still good on SSD
        if lost.any():
            lost &= self._store.suspect(plan.ssd_slots, plan.keys[plan.blocks])
        cache.end_direct_get(plan, int(ok.sum()), lost)

    def _fetched(self, cache: GlobalCacheEngine, plan: FetchPlan, graph: TransferGraph) -> None:
        with self._lock:
            cache.end_fetch(plan, graph.ops[0].ok)
            del self._fetch_ops[plan.fetch_id]
        cache.evict_ahead()

    # ---- write-back -------------------------------------------------------------------------------------------

    def put_ended(self, plan: PutPlan) -> None:
        """The blocks of a put are ready, and may be written to SSD."""
        if self._news(plan):
            self._wake()

    def _news(self, event: PutPlan | NDArray[np.uint64]) -> bool:
        """A put has ended, or a sequence ((n, 2) uint64) is loaded; True if some of it is to be written now."""
        writer = self._writer
        if writer is None:
            with self._lock:
                writer = self._writer
                if writer is None:
                    if self._early is not None:
                        self._early.add(event)
                    return False
        return writer.put(event) if isinstance(event, PutPlan) else writer.hit(event)

    def _wake(self) -> None:
        if self._transfer is not None:
            self._transfer.wake()

    def run_background_work(self) -> float:
        """Write what may be written now; returns in how many seconds to call again. On the background thread."""
        writer = self._writer
        if writer is None or self._transfer is None:
            return _IDLE_S
        if not self._write_lock.acquire(blocking=False):     # a reset waits for the disks, and wakes this thread then
            return _IDLE_S
        try:
            if self._early is not None:
                self._early.replay(writer)
            while self._may_write and (plan := writer.next(self._flush)) is not None:
                op = TransferOp(
                    OpKind.H2DISK, plan.host_slots, plan.ssd_slots, keys=plan.keys[plan.blocks], parents=plan.parents
                )
                graph = TransferGraph(next(self._transfer.task_ids), [op])
                with self._lock:
                    self._writes.add(graph.task_id)
                self._transfer.submit(graph, partial(self._written, plan), background=True)
        finally:
            self._write_lock.release()
        if self._flush and writer.idle:        # what was queued has gone meanwhile: no write ends that would tell of it
            self._transfer.notify()
        return min(_IDLE_S, writer.pause())

    @property
    def _may_write(self) -> bool:
        """Not when a write would fail at once: it would be planned again, without end."""
        return not self._is_over and self._transfer is not None and self._transfer.in_service

    def _written(self, plan: WritePlan, graph: TransferGraph) -> None:
        with self._lock:
            self._writes.discard(graph.task_id)
        if self._writer is not None:
            self._writer.ended(plan, graph.ops[0].ok)
            if self._flush or self._writer.pause() == 0.0:
                self._wake()

    def stats(self) -> dict[str, int]:
        """Counts of the writer and of the store; before it is open, directories of which none is usable."""
        if self._writer is None or self._store is None:
            return {"ssd_store_directories": len(self._config.ssd_directories), "ssd_store_directories_usable": 0}
        stats = self._writer.stats()
        stats["ssd_queued_blocks"] += self._num_early()
        return {**stats, **{f"ssd_store_{name}": n for name, n in self._store.stats().items()}}

    def _num_early(self) -> int:
        return self._early.num_blocks if self._early is not None else 0


def _fetch_op(plan: FetchPlan) -> TransferOp:
    return TransferOp(OpKind.DISK2H, plan.ssd_slots, plan.host_slots, keys=plan.keys[plan.blocks])


def make_ssd_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> Store:
    """Open the store in the directories of the configuration."""
    return SsdStore(
        config.ssd_directories, config.ssd_bytes, slot_bytes, domain, memory, make_queue=IoQueue,
        deadline_s=config.ssd_deadline_s, depth=config.ssd_queue_depth, method=config.ssd_io,
    )
