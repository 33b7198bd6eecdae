"""The blocks of one engine, on a cache in this process."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import NO_MATCH, MatchResult
from flexkv.controller.blocks import Blocks
from flexkv.controller.keys import Keys
from flexkv.controller.listener import RankGroup
from flexkv.controller.requests import Control
from flexkv.controller.response import KVResponse
from flexkv.controller.shared_cache import SharedCache
from flexkv.controller.tasks.arguments import (
    block_of,
    check_pages_of_task,
    keys_of,
    launch_of,
    number_of,
    seconds_of,
    span_of,
    task_id_of,
    task_ids_of,
    unique_task_ids_of,
)
from flexkv.controller.tasks.table import TaskTable
from flexkv.errors import NotReadyError, PinError
from flexkv.protocol.numbers import fence_of, integer_of
from flexkv.protocol.requests import Pin


class EngineBlocks(Blocks):
    """The blocks of one engine that uses a cache.

    ``start`` and ``shutdown`` are those of the engine: the cache runs before and after.

    Parameters
    ----------
    cache : SharedCache
    keys : Keys
    tokens_per_block : int
    num_ranks : int
        Ranks on each node.
    dp_client_id : int
        The engine's data-parallel rank, as its ranks name it.
    accept_within_s : float
        As in ``TaskTable``.
    first_task : int
        Its task ids are larger.
    task_ids, on_news
        As in ``TaskTable``.
    after_turn
        As in ``SharedCache.join``.
    on_other_layout
        As in ``RankGroup``.
    num_nodes : int
        While one of several nodes is away, matches are empty and nothing is saved.

    Attributes
    ----------
    tasks : TaskTable
    group : RankGroup
        Its ranks, for the cache's listener.
    """

    def __init__(
        self,
        cache: SharedCache,
        keys: Keys,
        tokens_per_block: int,
        num_ranks: int,
        dp_client_id: int,
        accept_within_s: float,
        *,
        first_task: int = 0,
        task_ids: Iterator[int] | None = None,
        on_news: Callable[[int], None] | None = None,
        after_turn: Callable[[], float] | None = None,
        num_nodes: int = 1,
        on_other_layout: Callable[[], None] = lambda: None,
    ) -> None:
        self._cache = cache
        self._space = cache.space
        self._keys = keys
        self._tokens_per_block = tokens_per_block
        client = cache.new_client()
        self.tasks = TaskTable(
            cache.transfer, client, tokens_per_block, cache.space.tiering, accept_within_s, task_ids=task_ids,
            on_news=on_news,
        )
        control = Control(self.pin, self.unpin, self.pins)
        self.group = RankGroup(
            client, num_ranks, dp_client_id, first_task, num_nodes, on_other_layout, control.answer
        )
        cache.join(self.tasks, after_turn)

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See ``Blocks``. The caller gives ``group`` to the cache's listener."""

    def is_ready(self) -> bool:
        """See ``Blocks``."""
        return self._cache.listener.is_ready(self.group.client) and self._cache.index is not None

    def wait_ready(self, timeout: float = 60.0) -> None:
        """See ``Blocks``."""
        timeout, transfer = seconds_of(timeout, "timeout"), self._cache.transfer
        ranks = self._cache.listener.describe_ranks(self.group.client)
        transfer.wait(
            lambda: self.is_ready() or self._cache.is_closed or not transfer.in_service, timeout if ranks else 0.0
        )
        if not self.is_ready():
            ranks = self._cache.listener.describe_ranks(self.group.client)
            raise NotReadyError(
                "the data plane is out of service: see the log" if not transfer.in_service else
                "the manager was shut down" if self._cache.is_closed else
                f"{ranks} after {timeout:g} s" if ranks else "the manager is not running: call start()"
            )

    def shutdown(self) -> None:
        """See ``Blocks``. The engine's tasks are cancelled; the cache keeps its blocks."""
        self.tasks.reset()

    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """See ``Blocks``. If other engines use the cache, ``new_weights`` concerns this engine alone: its keys change,
        and the KV of the others stays."""
        timeout = seconds_of(timeout, "timeout")
        self.tasks.wait(self.begin_reset(new_weights), timeout, self.tasks.is_settled)

    def begin_reset(self, new_weights: bool) -> list[int]:
        """As ``reset``, without the wait; returns the ids of the engine's tasks that still run."""
        if new_weights:
            self._keys.change_domain()
        if not new_weights or self._cache.num_engines == 1:
            self._cache.reset()
        return self.tasks.reset()

    # ---- keys -------------------------------------------------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """See ``Blocks``."""
        return self._keys.hasher(namespace)

    def keys(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None = None,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> NDArray[np.uint64]:
        """See ``Blocks``."""
        return self._keys.keys(token_ids, namespace, block_extras)

    def tenant(self, namespace: Sequence[str] | None) -> int:
        """See ``Blocks``."""
        return self._space.tenant(namespace)

    def _tenant_of(self, tenant: int) -> int:
        return integer_of(tenant, "tenant", 0, self._space.num_tenants - 1)

    # ---- matching ---------------------------------------------------------------------------------------------

    @property
    def _index(self) -> GlobalCacheEngine | None:
        """The index, while blocks can be moved."""
        if self.group.num_nodes > 1 and not self._cache.transfer.has_ranks(self.group.client):
            return None
        return self._cache.index

    def record_request(self, keys: NDArray[np.uint64]) -> None:
        """See ``Blocks``."""
        self._cache.recorder.record(keys_of(keys))

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
        num_tokens, space = self._keys.length_of(num_tokens, keys), self._space
        self._cache.recorder.record(keys)
        task = self.tasks.new_get(
            self._index, keys, start, None, num_tokens, host_only=bool(host_only), tenant=tenant
        )
        self.tasks.hold(task)
        space.counts.count(task.match, start, len(keys))
        return task.task_id, task.blocks

    def match_put(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0
    ) -> tuple[int, NDArray[np.int32]]:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), self._tenant_of(tenant)
        num_tokens, tasks = self._keys.length_of(num_tokens, keys), self.tasks
        task = tasks.new_put(self._index, keys, start, len(keys), num_tokens, tenant)
        tasks.hold(task)
        return task.task_id, task.blocks

    def launch(
        self, task_ids: int | Iterable[int], pages: Sequence[NDArray[np.int32]], fence: int = 0,
        layerwise: bool = False, counter: int = 0,
    ) -> list[int]:
        """See ``Blocks``."""
        ids, given, fence, layerwise, counter = launch_of(task_ids, pages, fence, layerwise, counter)
        launches = [(self.tasks.matched(task_id), part) for task_id, part in zip(ids, given, strict=True)]
        for task, part in launches:
            check_pages_of_task(task.task_id, len(task.blocks), len(part), task.tokens_per_block)
        self.tasks.launch(launches, fence, layerwise, counter)
        return ids

    # ---- gets and puts in one call ----------------------------------------------------------------------------

    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, tenant: int = 0,
    ) -> int:
        """See ``Blocks``."""
        keys, start, pages = span_of(keys, start_block, pages)
        fence, tenant, tasks = fence_of(fence), self._tenant_of(tenant), self.tasks
        task = tasks.new_get(
            self._index, keys, start, start + len(pages), 0, host_only=bool(layerwise), tenant=tenant
        )
        tasks.run(task, pages, fence, bool(layerwise))
        return task.task_id

    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0, tenant: int = 0,
        *, provisional: bool = False, after: Iterable[int] = (),
    ) -> int | None:
        """See ``Blocks``."""
        keys, start, pages = span_of(keys, start_block, pages)
        fence, tenant, loads, tasks = fence_of(fence), self._tenant_of(tenant), task_ids_of(after), self.tasks
        task = tasks.new_put(self._index, keys, start, start + len(pages), 0, tenant, bool(provisional))
        if len(task.blocks) == 0:
            tasks.discard(task)
            return None
        tasks.run(task, pages[task.blocks - start], fence, after=loads)
        return task.task_id

    def accept_put(self, task_id: int, stop_block: int | None = None) -> None:
        """See ``Blocks``."""
        stop = math.inf if stop_block is None else block_of(stop_block, "stop_block")
        self.tasks.accept(task_id_of(task_id), stop)

    def prefetch_blocks(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, *, num_tokens: int = 0,
        must_answer: bool = False,
    ) -> int | None:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), self._tenant_of(tenant)
        num_tokens = self._keys.length_of(num_tokens, keys) if num_tokens else 0
        tiering = self._space.tiering
        is_busy = tiering is not None and tiering.promotes_enough
        if is_busy and not must_answer:
            return None
        return self.tasks.prefetch(self._index, keys, num_tokens, start, tenant, host_only=is_busy)

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """See ``Blocks``."""
        self._space.set_prefill_rate(number_of(tokens_per_s, "tokens_per_s", 0.0, 1e12))

    # ---- tasks ------------------------------------------------------------------------------------------------

    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """See ``Blocks``."""
        return self.tasks.blocks(task_id_of(task_id))

    def task_match(self, task_id: int) -> MatchResult | None:
        """See ``Blocks``."""
        return self.tasks.match(task_id_of(task_id))

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """See ``Blocks``."""
        ids, tasks = unique_task_ids_of(task_ids), self.tasks
        tasks.wait(ids, seconds_of(timeout, "timeout"), tasks.is_settled if completely else tasks.has_result)
        return {task_id: tasks.take(task_id) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """See ``Blocks``."""
        ids, tasks = unique_task_ids_of(task_ids), self.tasks
        self._cache.transfer.poll()
        return {task_id: tasks.take(task_id) for task_id in ids if tasks.is_settled(task_id)}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """See ``Blocks``."""
        for task_id in task_ids_of(task_ids):
            self.tasks.cancel(task_id)

    # ---- pins and counts --------------------------------------------------------------------------------------

    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """See ``Blocks``."""
        return self.pin_keys(self.keys(token_ids, namespace), name, self.tenant(namespace))

    def pin_keys(self, keys: NDArray[np.uint64], name: str, tenant: int) -> Pin:
        """As ``pin``; ``keys``: (n, 2) uint64, of the prefix."""
        index = self._space.index
        if index is None:
            raise PinError("no rank has registered yet, so nothing is cached: pin when the engine is up")
        return index.pin(keys_of(keys), name, self._tenant_of(tenant))

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
        return self._cache.stats()

    def check_integrity(self) -> None:
        """See ``Blocks``."""
        if self._space.index is not None:
            self._space.index.check_integrity()
