"""KVManager: what an engine calls to load and save KV."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv.controller.kvblocks import KVBlocks
from flexkv.controller.response import KVResponse, KVResponseStatus
from flexkv.controller.tasks.arguments import part_of_mapping, task_ids_of, tokens_and_start, tokens_of
from flexkv.errors import ArgumentError, FlexKVError, SlotMappingError
from flexkv.protocol.layer_signals import MAX_COUNTERS
from flexkv.protocol.numbers import fence_of, integer_of


class KVManager(KVBlocks):
    """Loads and saves the KV of token sequences for one engine (one data-parallel client).

    See ``KVBlocks`` for its life, its results, and what it does by blocks instead of tokens.
    """

    # ---- tokens: the API that upstream's adapters use ---------------------------------------------------------

    def get_match(
        self,
        token_ids: ArrayLike,
        token_mask: NDArray[np.bool_] | None = None,
        cpu_only: bool = False,
        namespace: Sequence[str] | None = None,
        swa_aware: bool = False,
        *,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> tuple[int, NDArray[np.bool_]]:
        """Find the blocks that can be loaded, and hold them until ``launch`` or ``cancel``.

        Parameters
        ----------
        token_ids : (num_tokens,) int32 or int64
            The sequence from its first token.
        token_mask : (num_tokens,) bool, optional
            False for the leading tokens whose KV the engine has; a block is loaded only as a whole.
        cpu_only : bool
            Only blocks that are in host memory now (``prefetch_async`` reads the rest from SSD). Always so with
            ``enable_layerwise_transfer``: a read of SSD may fail, and layers cannot report that.
        namespace : sequence of str, optional
            LoRA, cache salt, tenant: KV is shared only between equal namespaces. The blocks count against the quota
            of the first entry that the setting ``namespaces`` names.
        block_extras : mapping from block index to bytes, optional
            Content other than tokens that a block depends on, such as a digest of an image.

        Returns
        -------
        task_id : int
        mask : (num_tokens,) bool
            Tokens that ``launch`` will load. ``task_match(task_id)`` has the reason why no more, and its time.
        """
        self._refuse_swa(swa_aware)
        tokens, start = tokens_and_start(token_ids, token_mask, self._tokens_per_block)
        keys = self._keys(tokens, namespace, block_extras)
        group = self.group(namespace)
        self.recorder.record(keys)
        task = self._tasks.new_get(
            self._index, keys, start, None, len(tokens), host_only=bool(cpu_only) or self._host_only,
            group=group,
        )
        self._tasks.hold(task)
        self._counts.count(task.match, start, len(keys))
        return task.task_id, task.token_mask()

    def put_match(
        self,
        token_ids: ArrayLike,
        token_mask: NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
        *,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> tuple[int, NDArray[np.bool_]]:
        """Reserve slots for the blocks that are not cached yet, until ``launch`` or ``cancel``.

        Arguments as ``get_match``.

        Returns
        -------
        task_id : int
        mask : (num_tokens,) bool
            Tokens that ``launch`` will save.
        """
        tokens, start = tokens_and_start(token_ids, token_mask, self._tokens_per_block)
        keys = self._keys(tokens, namespace, block_extras)
        task = self._tasks.new_put(self._index, keys, start, len(keys), len(tokens), self.group(namespace))
        self._tasks.hold(task)
        return task.task_id, task.token_mask()

    def launch(
        self,
        task_ids: int | Sequence[int],
        slot_mappings: ArrayLike | Sequence[ArrayLike],
        swa_slot_mappings: None = None,
        as_batch: bool = False,
        layerwise_transfer: bool = False,
        counter_id: int = 0,
        *,
        fence: int = 0,
    ) -> list[int]:
        """Start the transfers of matched tasks.

        Parameters
        ----------
        task_ids : int or sequence of int
        slot_mappings : sequence of (k,) int32 or int64
            For each task, the engine's token slot for each token of its mask, in order.
        as_batch : bool
            No effect: the data plane takes all queued ops together in any case.
        layerwise_transfer : bool
            Load layer by layer, and signal each rank's eventfd of ``counter_id`` (from 0) for each layer that has
            arrived (``enable_layerwise_transfer``). Layers of a load that fails are never signalled.
        fence : int
            Steps of the rank (``KVTPClient.advance_fence``) before which the pages must not be touched; 0: none.

        Returns
        -------
        list of int
            The ids to wait for.

        Raises
        ------
        SlotMappingError
            A mapping does not fit its task; no task of the call was launched.
        TaskError
            A task is not known, was launched or ended already, or is given twice; no task of the call was launched.
        """
        if swa_slot_mappings is not None:
            raise NotImplementedError("sliding-window transfers are not available in this version")
        ids, fence = task_ids_of(task_ids), fence_of(fence)
        counter = integer_of(counter_id, "counter_id", 0, MAX_COUNTERS - 1) + 1 if layerwise_transfer else 0
        if layerwise_transfer and len(ids) != 1:
            raise ArgumentError(f"layerwise_transfer with {len(ids)} tasks: launch one task at a time")
        if not isinstance(slot_mappings, Iterable):
            raise SlotMappingError(f"slot_mappings is {slot_mappings!r}: give a sequence of arrays, one for each task")
        mappings = list(slot_mappings) if isinstance(task_ids, Iterable) else [slot_mappings]
        if len(ids) != len(mappings):
            raise SlotMappingError(f"{len(mappings)} slot mappings for {len(ids)} tasks: give one for each")
        tasks = [self._tasks.matched(task_id) for task_id in ids]
        pages = [task.pages(mapping) for task, mapping in zip(tasks, mappings, strict=True)]
        self._tasks.launch(
            list(zip(tasks, pages, strict=True)), fence, bool(layerwise_transfer), counter
        )
        return ids

    def get_async(
        self,
        token_ids: ArrayLike,
        slot_mapping: ArrayLike,
        token_mask: NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
    ) -> int:
        """``get_match`` and ``launch`` in one; ``slot_mapping`` is for all tokens, or for those in ``token_mask``."""
        task_id, mask = self.get_match(token_ids, token_mask, namespace=namespace)
        return self._launch_part(task_id, mask, slot_mapping, token_mask)

    def put_async(
        self,
        token_ids: ArrayLike,
        slot_mapping: ArrayLike,
        token_mask: NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
    ) -> int:
        """``put_match`` and ``launch`` in one; ``slot_mapping`` is for all tokens, or for those in ``token_mask``."""
        task_id, mask = self.put_match(token_ids, token_mask, namespace=namespace)
        return self._launch_part(task_id, mask, slot_mapping, token_mask)

    def prefetch_async(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, swa_aware: bool = False
    ) -> int:
        """Read blocks of slower tiers into host memory. The task ends when they have arrived; its mask marks them. No
        block is read while prefetches fill a quarter of host memory."""
        self._refuse_swa(swa_aware)
        tokens = tokens_of(token_ids)
        return self._tasks.prefetch(
            self._index, self._keys(tokens, namespace), len(tokens), group=self.group(namespace),
            host_only=self._fetches_enough(),
        )

    def _refuse_swa(self, swa_aware: bool) -> None:
        if swa_aware:
            raise NotImplementedError("swa_aware: sliding-window groups are not available in this version")

    def _launch_part(
        self, task_id: int, mask: NDArray[np.bool_], slot_mapping: ArrayLike, token_mask: NDArray[np.bool_] | None
    ) -> int:
        try:
            self.launch([task_id], [part_of_mapping(slot_mapping, mask, token_mask)])
        except FlexKVError:
            self.cancel(task_id)
            raise
        return task_id


__all__ = ["KVManager", "KVResponse", "KVResponseStatus"]
