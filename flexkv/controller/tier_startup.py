"""Brings a lower tier into service: opens its store, finds the blocks that it holds, and puts them into the index."""

import hashlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.admission.write_back import WriteBack
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.lower_tier import TierService
from flexkv.config import CacheConfig
from flexkv.storage.host_pool import HostPool
from flexkv.storage.recovered import Recovered
from flexkv.storage.store import Store, TierKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.executors.store import StoreExecutor

_BATCH_BYTES = 32 << 20
"""Written as one op: enough for large writes, and little for a read to wait behind."""

_IN_FLIGHT_BYTES = 128 << 20
"""Written at a time: the host slots of these blocks cannot be evicted meanwhile."""

_QUEUE_SHARE = 2
"""At most 1/2 of the host slots may wait for write-back; a block evicted before its turn is lost. Not less, because a
long prompt is queued as a whole."""

_WRITE_SHARE = 4
"""At most 1/4 of the host slots are written at a time: a slow disk must leave room for loads and saves."""


def open_store(
    kind: TierKind, tier: int, config: CacheConfig, domain: bytes, pool: HostPool, transfer: TransferEngine
) -> tuple[Store, Recovered] | None:
    """Open the store of a tier, find its blocks, and pass the store to the data plane, which closes it.

    Returns the store and the blocks found; None if the data plane is shutting down.

    Raises
    ------
    FlexKVError, OSError
        The store cannot be opened.
    """
    identity = b"\0".join([domain, config.secret, pool.content])
    store = kind.make_store(config, pool.slot_bytes, hashlib.sha256(identity).digest(), pool.memory)
    try:
        found = store.recover()
        is_wanted = transfer.add_executor(StoreExecutor(store, tier))
    except BaseException:
        store.close()
        raise
    if not is_wanted:
        store.close()
        return None
    return store, found


def index_blocks(
    cache: GlobalCacheEngine, tier: int, kind: TierKind, config: CacheConfig, store: Store, found: Recovered,
    usable: Callable[[], bool], is_stale: bool = False,
) -> int:
    """Put a tier into service, and enter the blocks found in its store into the index, parents before children. Frees
    the slots of blocks that do not enter the index. Returns the number of blocks entered.

    ``usable``: as in ``TierService``. ``is_stale``: the blocks were found before a reset, and do not enter the
    index.
    """
    indexed = np.zeros(len(found), dtype=np.bool_)

    def sequences() -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int32]]]:
        for path in found.paths():
            yield found.keys[path], np.where(indexed[path], np.int32(-1), found.slots[path])
            indexed[path] = True

    service = TierService(
        store.slots, CostModel(store.slot_bytes, time.monotonic), usable, store.usable_slots,
        read_deadline_s=kind.read_deadline_s(config),
        checksums=store.checksums,
        loads_directly=lambda: store.device_is_ready,
        # Not to a tier that selects its blocks: nothing is known yet about the reuse of these.
        saves_directly=lambda: kind.writes_all(config) and store.device_is_ready,
    )
    try:
        cache.attach(tier, service, () if is_stale else sequences())
    finally:
        cache.free(tier, found.slots[~indexed])
    return int(indexed.sum())


def in_flight_blocks(slot_bytes: int, num_slots: int) -> int:
    """Maximum number of blocks that are written at a time, of a pool that has ``num_slots`` slots now."""
    return max(1, min(max(_BATCH_BYTES, _IN_FLIGHT_BYTES) // slot_bytes, num_slots // _WRITE_SHARE))


def write_back_to(
    kind: TierKind, tier: int, cache: GlobalCacheEngine, config: CacheConfig, pool: HostPool
) -> WriteBack:
    """Make the write-back to a tier; its limits follow from the tier's settings and the size of the host pool."""
    batch = max(1, _BATCH_BYTES // pool.slot_bytes)
    return WriteBack(
        cache, tier,
        write_all=kind.writes_all(config),
        batch_blocks=batch,
        max_in_flight_blocks=in_flight_blocks(pool.slot_bytes, pool.num_slots),
        max_queued_blocks=max(batch, pool.num_slots // _QUEUE_SHARE),
        blocks_per_s=kind.write_bytes_per_s(config) / pool.slot_bytes,
        clock=time.monotonic,
    )
