"""One lower tier of a space: its store, from start to shutdown, and the write-back behind puts."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.admission.write_back import WriteBack
from flexkv.cache.early_traffic import EarlyTraffic
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import Move, PutPlan
from flexkv.config import CacheConfig
from flexkv.controller.tasks.erasure import erase
from flexkv.controller.tier_startup import in_flight_blocks, index_blocks, open_store, write_back_to
from flexkv.errors import FlexKVError
from flexkv.protocol.ring import OpKind
from flexkv.storage.host_pool import HostPool
from flexkv.storage.recovered import Recovered
from flexkv.storage.ssd.gds_queue import GdsEnd, GdsQueue
from flexkv.storage.store import Store, TierKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import TransferGraph, TransferOp

logger = logging.getLogger("flexkv.controller")

IDLE_S = 1.0
"""Seconds between two looks at the queue when nothing happens."""

DRAIN_S = 30.0
"""Seconds that a shutdown waits for the store to open and for the queue to be written."""


def drain_deadline() -> float:
    """Time (``time.monotonic``) at which a shutdown that begins now stops to wait: in ``DRAIN_S`` seconds."""
    return time.monotonic() + DRAIN_S


class LowerTier:
    """The store of a lower tier and the write-back to it. Thread safe.

    The store is opened in the background. Until it is open, and if it cannot be opened, the tier offers no block and
    takes none.

    Parameters
    ----------
    number : int
        Number of the tier in the index.
    kind : TierKind
    config : CacheConfig
    domain : bytes
        Identity of everything that must be equal for KV to be comparable. The store ignores blocks of other domains.
    on_opened : callable
        Called once, when the store is open or cannot be opened.

    Attributes
    ----------
    description : str
        Text about the tier for the log; final when ``on_opened`` is called.
    """

    def __init__(
        self, number: int, kind: TierKind, config: CacheConfig, domain: bytes, on_opened: Callable[[], None]
    ) -> None:
        self.description = f"{kind.label} not in service"
        self._number = number
        self._kind = kind
        self._config = config
        self._domain = domain
        self._on_opened = on_opened
        self._write_lock = threading.RLock()   # from a plan to write until it is submitted; taken before any other
        self._lock = threading.Lock()          # taken before the index's and the data plane's
        self._writes: set[int] = set()
        self._num_slots = self._usable_slots = 0       # now; and those that the store may register
        self._flush = self._is_over = False    # a shutdown writes without the rate limit; then nothing more is written
        self._uncleared = False                # there was a reset, and the store was not cleared, or could not be
        self._cache: GlobalCacheEngine | None = None
        self._transfer: TransferEngine | None = None
        self._store: Store | None = None
        self._gds: GdsEnd | None = None     # of a rank, until the store is open
        self._writer: WriteBack | None = None
        self._early: EarlyTraffic | None = EarlyTraffic()     # None: the store cannot be opened
        self._thread: threading.Thread | None = None

    # ---- start and end ----------------------------------------------------------------------------------------

    def grow(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool, num_slots: int) -> None:
        """Record that the pool has ``num_slots`` usable slots. The first call opens the store in the background."""
        with self._lock:
            if self._thread is None:
                self._cache, self._transfer = cache, transfer
                self._thread = threading.Thread(
                    target=self._open, args=(cache, transfer, pool), name=f"flexkv-{self._kind.name}", daemon=True
                )
                self._thread.start()
            self._usable_slots = min(num_slots, pool.fixed_slots)
            store = self._store
        if store is not None:
            store.register(self._usable_slots * store.slot_bytes)
        self.limit(num_slots)

    def limit(self, num_slots: int) -> None:
        """Record that the pool has ``num_slots`` slots now, of which only a part may be written at a time."""
        self._num_slots = num_slots
        if self._writer is not None and self._store is not None:
            self._writer.limit(in_flight_blocks(self._store.slot_bytes, num_slots))

    def _open(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool) -> None:
        try:
            with memoryview(pool.memory):                    # stays mapped, also if the manager does not wait for this
                self._bring_up(cache, transfer, pool)
        except Exception as error:
            expected = isinstance(error, (FlexKVError, OSError))
            logger.error("the %s tier is not in service: %s", self._kind.label, error, exc_info=not expected)
            with self._lock:
                self._early = None
        self._on_opened()

    def _bring_up(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool) -> None:
        start, kind, config = time.monotonic(), self._kind, self._config
        opened = open_store(kind, self._number, config, self._domain, pool, transfer)
        if opened is None:
            return
        store, found = opened
        count = self._index(cache, store, found)
        logger.info(
            "%s tier: %d slots, %d blocks found, %.2f s", kind.label, store.num_slots, count, time.monotonic() - start
        )
        gib = round(kind.num_bytes(config) / (1 << 30), 3)
        self.description = f"{kind.label} {gib:g} GiB ({store.num_slots} blocks, {count} found)"
        writer = write_back_to(kind, self._number, cache, config, pool)
        with self._lock:
            self._writer = writer
        self.limit(self._num_slots)
        self._wake()

    def _index(self, cache: GlobalCacheEngine, store: Store, found: Recovered) -> int:
        with self._write_lock:
            with self._lock:
                self._store, usable_slots, is_stale = store, self._usable_slots, self._uncleared
            if is_stale:
                self._clear(store)
        store.register(usable_slots * store.slot_bytes)
        self._connect_gds()
        return index_blocks(
            cache, self._number, self._kind, self._config, store, found, self._usable, is_stale
        )

    def attach_gds(self, end: GdsEnd) -> None:
        """Give the store a rank's socket for GPUDirect Storage, over which it requests moves between the tier and the
        GPU. Takes ownership; replaces a socket that was not used yet."""
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

    def _usable(self) -> bool:
        store = self._store
        return store is not None and not self._uncleared and store.usable()

    def suspend(self) -> None:
        """Take the tier out of service until ``reset`` has cleared its store."""
        with self._write_lock, self._lock:
            self._uncleared = True

    def reset(self) -> None:
        """Drop the blocks of the tier, its queue of writes, and the writes under way. The index must have been reset,
        and ``suspend`` called, before."""
        with self._write_lock:
            with self._lock:
                self._uncleared = True                     # again, if the store was opened since ``suspend``
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
        """Clear the store; the tier is out of service until that is done."""
        try:
            store.clear()
            self._uncleared = False
        except (FlexKVError, OSError) as error:
            logger.error("the %s tier is out of service until a reset succeeds: %s", self._kind.label, error)

    def flush(self) -> None:
        """Write without the rate limit from now on."""
        if not self._is_over:
            self._flush = True
            self._wake()

    def shutdown(self, deadline: float) -> None:
        """Wait until the queued blocks are written, or until ``deadline`` (``time.monotonic``). ``flush`` must have
        been called before. No write begins afterwards. The data plane closes the store."""
        with self._lock:
            gds, self._gds = self._gds, None
        if gds is not None:
            gds.close()
        if self._thread is None or self._transfer is None or self._is_over:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("the %s tier has not opened within %g s; it closes when it has", self._kind.label, DRAIN_S)
        writer = self._writer
        if writer is not None and self._may_write:
            left_s = max(0.0, deadline - time.monotonic())
            if not self._transfer.wait(lambda: writer.idle and not self._writes and self._num_early() == 0, left_s):
                logger.warning(
                    "not all was written to %s within %g s: %d blocks are not there after a restart",
                    self._kind.label, DRAIN_S, writer.num_unwritten() + self._num_early(),
                )
        self._is_over = True

    # ---- traffic ----------------------------------------------------------------------------------------------

    def lost(self, move: Move, ok: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(m,) bool: blocks of a read from the tier that are not ``ok`` ((m,) bool) and that the store does not have
        any more. A block whose read was cancelled is not lost."""
        lost = ~ok
        if self._store is not None and lost.any():
            lost &= self._store.suspect(move.src, move.keys[move.blocks])
        return lost

    def notify(self, event: PutPlan | NDArray[np.uint64]) -> None:
        """Report a put that has ended, or the keys ((n, 2) uint64) of a sequence that is loaded, to the write-back,
        which may queue its blocks."""
        writer = self._writer
        if writer is None:
            with self._lock:
                writer = self._writer
                if writer is None:
                    if self._early is not None:
                        self._early.add(event)
                    return
        if writer.put(event) if isinstance(event, PutPlan) else writer.hit(event):
            self._wake()

    def _wake(self) -> None:
        if self._transfer is not None:
            self._transfer.wake()

    def write(self) -> float:
        """Start the writes that rate and limits allow now; returns the seconds until the next call. Must be called on
        the data plane's background thread."""
        writer = self._writer
        if writer is None or self._transfer is None:
            return IDLE_S
        if not self._write_lock.acquire(blocking=False):     # a reset waits for the disks, and wakes this thread then
            return IDLE_S
        try:
            if self._early is not None:
                self._early.replay(writer)
            while self._may_write and (move := writer.next(self._flush)) is not None:
                op = TransferOp(
                    OpKind.H2STORE, move.src, move.dst, keys=move.keys[move.blocks], parents=move.parents,
                    tier=self._number,
                )
                graph = TransferGraph(next(self._transfer.task_ids), [op])
                with self._lock:
                    self._writes.add(graph.task_id)
                self._transfer.submit(graph, partial(self._written, move), background=True)
        finally:
            self._write_lock.release()
        if self._flush and writer.idle:        # the queue was emptied meanwhile: no write ends that would notify
            self._transfer.notify()
        return min(IDLE_S, writer.pause())

    @property
    def _may_write(self) -> bool:
        """Not when a write would fail at once: it would be planned again, without end."""
        return not self._is_over and self._transfer is not None and self._transfer.in_service

    def _written(self, move: Move, graph: TransferGraph) -> None:
        if self._writer is not None:
            self._writer.ended(move, graph.ops[0].ok)
        if self._transfer is not None and len(move.to_erase):
            erase(self._transfer, graph.task_id, self._number, move.to_erase, partial(self._erased, move, graph))
        else:
            self._erased(move, graph)

    def _erased(self, move: Move, graph: TransferGraph) -> None:
        if self._cache is not None:
            self._cache.erased(move)
        with self._lock:
            self._writes.discard(graph.task_id)
        if self._writer is not None and (self._flush or self._writer.pause() == 0.0):
            self._wake()

    def stats(self) -> dict[str, int]:
        """Counts of the write-back and of the store; names begin with the tier's name."""
        name = self._kind.name
        if self._writer is None or self._store is None:
            return {f"{name}_store_{key}": n for key, n in self._kind.closed_stats(self._config).items()}
        stats = self._writer.stats()
        stats["queued_blocks"] += self._num_early()
        stats |= {f"store_{key}": n for key, n in self._store.stats().items()}
        return {f"{name}_{key}": n for key, n in stats.items()}

    def _num_early(self) -> int:
        return self._early.num_blocks if self._early is not None else 0
