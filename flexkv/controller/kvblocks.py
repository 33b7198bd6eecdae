"""KV by blocks: the API that this package's adapters use. ``KVManager`` adds the one that upstream's adapters use."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import NOTHING, MatchResult
from flexkv.controller.controller import Controller
from flexkv.controller.response import KVResponse
from flexkv.controller.tasks.arguments import (
    block_of,
    keys_of,
    number_of,
    seconds_of,
    span_of,
    task_id_of,
    task_ids_of,
    unique_task_ids_of,
)
from flexkv.protocol.numbers import fence_of, integer_of


class KVBlocks(Controller):
    """Loads and saves the KV of token sequences for one engine, by keys of blocks and pages.

    See ``Controller`` for its life. Arguments are checked before anything is reserved: a bad one raises ArgumentError,
    and the call has changed nothing.
    """

    def lookup(
        self, keys: NDArray[np.uint64], start_block: int = 0, group: int = 0, count: bool = False
    ) -> MatchResult:
        """How many leading blocks of ``keys`` ((n, 2) uint64) can be loaded, why no more, since when. Holds nothing.

        ``start_block``: those before it are not to be loaded. ``count``: in ``stats``, by reason; once a request.
        """
        keys, start_block, group = keys_of(keys), block_of(start_block, "start_block"), self._group_of(group)
        index = self._index
        match = index.match(keys, start_block, group) if index is not None else NOTHING
        if count:
            self._counts.count(match, start_block, len(keys))
        return match

    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, group: int = 0,
    ) -> int:
        """Load blocks ``[start_block, start_block + len(pages))`` of a sequence into ``pages``.

        A block that is not ready fails, and with it the task; the others are loaded. ``layerwise``: for
        ``KVTPClient.follow_load``; blocks that are not in host memory fail, because later loads must not overtake.
        """
        keys, start, pages = span_of(keys, start_block, pages)
        fence, group = fence_of(fence), self._group_of(group)
        task = self._tasks.new_get(
            self._index, keys, start, start + len(pages), 0, host_only=bool(layerwise), group=group
        )
        self._tasks.run(task, pages, fence, bool(layerwise))
        return task.task_id

    def prefetch_blocks(self, keys: NDArray[np.uint64], start_block: int = 0, group: int = 0) -> int | None:
        """Bring blocks of a sequence from there on into host memory; the task ends when they are there. None: too much
        is being brought there already."""
        keys, start_block, group = keys_of(keys), block_of(start_block, "start_block"), self._group_of(group)
        if self._fetches_enough():
            return None
        return self._tasks.prefetch(self._index, keys, 0, start_block, group)

    def _group_of(self, group: int) -> int:
        return integer_of(group, "group", 0, len(self._quotas) - 1)

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
        keys, start, pages = span_of(keys, start_block, pages)
        fence, group, loads = fence_of(fence), self._group_of(group), task_ids_of(after)
        task = self._tasks.new_put(self._index, keys, start, start + len(pages), 0, group, bool(provisional))
        if len(task.blocks) == 0:
            self._tasks.discard(task)
            return None
        self._tasks.run(task, pages[task.blocks - start], fence, after=loads)
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
        self._tasks.accept(task_id_of(task_id), math.inf if stop_block is None else block_of(stop_block, "stop_block"))

    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """Positions in its sequence of the blocks that a running task moves."""
        return self._tasks.blocks(task_id_of(task_id))

    def task_match(self, task_id: int) -> MatchResult | None:
        """What a get found when it was made: how many blocks, why no more, and since when; None: it is not known."""
        return self._tasks.match(task_id_of(task_id))

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """Set the prefill speed that the adapter has measured; ``prefill_tokens_per_s`` of the configuration wins."""
        rate = number_of(tokens_per_s, "tokens_per_s", 0.0, 1e12)
        if self._tiering is not None:
            self._tiering.set_prefill_rate(rate)

    # ---- results ----------------------------------------------------------------------------------------------

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for tasks, at most ``timeout`` seconds; a result is given once.

        A task that still runs then has the status TIMEOUT; it continues, and can be waited for again. A task that took
        longer than ``op_timeout_s`` (TIMEOUT) or was cancelled (CANCELLED) may still access its pages for a moment;
        ``completely`` waits until it does not.
        """
        ids = unique_task_ids_of(task_ids)
        has_ended = self._tasks.is_settled if completely else self._tasks.has_result
        self._tasks.wait(ids, seconds_of(timeout, "timeout"), has_ended)
        return {task_id: self._tasks.take(task_id) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """Results of those of the tasks that have ended, without waiting; a result is given once."""
        ids = unique_task_ids_of(task_ids)
        self._transfer.poll()
        return {task_id: self._tasks.take(task_id) for task_id in ids if self._tasks.is_settled(task_id)}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Stop tasks: copies that have not started never start, those under way are finished first (see ``wait``)."""
        for task_id in task_ids_of(task_ids):
            self._tasks.cancel(task_id)
