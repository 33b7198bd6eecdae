"""KVManager: the interface that an engine calls to load and save KV."""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.slot_mapping import pages_from_slot_mapping
from flexkv.cache.plan import MatchResult
from flexkv.config import CacheConfig, ModelConfig, TransferConfig, load_config
from flexkv.controller.blocks import Blocks
from flexkv.controller.response import KVResponse, KVResponseStatus, mask_of_blocks
from flexkv.controller.tasks.arguments import mapping_of, part_of_mapping, task_ids_of, tokens_and_start, tokens_of
from flexkv.errors import FlexKVError, SlotMappingError
from flexkv.protocol.layer_signals import MAX_COUNTERS
from flexkv.protocol.numbers import integer_of
from flexkv.protocol.requests import Pin
from flexkv.server.connect import connect
from flexkv.storage.store import TierKind


class KVManager:
    """Loads and saves the KV of token sequences for one engine (one data-parallel client).

    Never blocks on a transfer except in ``wait``, ``reset`` and ``shutdown``. Matches are empty and puts save nothing
    until every rank has registered its tensors, after ``shutdown``, and while the data plane is out of service. Thread
    safe. Arguments are checked before anything is reserved: a bad one raises ArgumentError, and the call has changed
    nothing.

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
    tiers : sequence of TierKind, optional
        The tiers below host memory, the fastest first. Default: those of the configuration.
    note : str
        End of the line that the log gets when the manager is ready, such as the engine's role.

    Attributes
    ----------
    blocks : Blocks
        The same KV, by keys of blocks and by pages instead of tokens and slots.
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
        tiers: Sequence[TierKind] | None = None,
        note: str = "",
    ) -> None:
        if event_collector is not None:
            raise NotImplementedError("event_collector: KV events are not available in this version; pass None")
        transfer_config = transfer_config or load_config().transfer
        self._tokens_per_block = cache_config.tokens_per_block
        self._host_only = transfer_config.enable_layerwise_transfer
        self.blocks: Blocks = connect(
            model_config, cache_config, transfer_config, dp_client_id, gpu_register_port,
            tiers=tiers, note=note,
        )

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for the ranks; returns at once."""
        self.blocks.start()

    def is_ready(self) -> bool:
        """Whether every rank has registered, so that KV can be loaded and saved."""
        return self.blocks.is_ready()

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until every rank has registered, at most ``timeout`` seconds; then NotReadyError. See ``Blocks``."""
        self.blocks.wait_ready(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Write the blocks queued for SSD, cancel running transfers, free all memory. May be called again."""
        self.blocks.shutdown()

    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """Forget all cached KV, as after a change of weights, and all pins. Nothing put before is returned after it.

        Running tasks are cancelled; ``timeout`` bounds the wait for them (seconds). ``new_weights``: the engine's
        weights are no longer those that ``ModelConfig`` names; see ``Blocks``.
        """
        self.blocks.reset(timeout, new_weights=new_weights)

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
        """Find the blocks that can be loaded, and acquire them until ``launch`` or ``cancel``.

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
        task_id, positions = self.blocks.match_get(
            self.blocks.keys(tokens, namespace, block_extras), start, len(tokens), self.blocks.tenant(namespace),
            bool(cpu_only) or self._host_only,
        )
        return task_id, mask_of_blocks(positions, self._tokens_per_block, len(tokens))

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
        task_id, positions = self.blocks.match_put(
            self.blocks.keys(tokens, namespace, block_extras), start, len(tokens), self.blocks.tenant(namespace)
        )
        return task_id, mask_of_blocks(positions, self._tokens_per_block, len(tokens))

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
        ids = task_ids_of(task_ids)
        counter = integer_of(counter_id, "counter_id", 0, MAX_COUNTERS - 1) + 1 if layerwise_transfer else 0
        if not isinstance(slot_mappings, Iterable):
            raise SlotMappingError(f"slot_mappings is {slot_mappings!r}: give a sequence of arrays, one for each task")
        mappings = slot_mappings if isinstance(task_ids, Iterable) else [slot_mappings]
        pages = [pages_from_slot_mapping(mapping_of(mapping), self._tokens_per_block) for mapping in mappings]
        return self.blocks.launch(ids, pages, fence, bool(layerwise_transfer), counter)

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
        keys, tenant = self.blocks.keys(tokens, namespace), self.blocks.tenant(namespace)
        task_id = self.blocks.prefetch_blocks(keys, 0, tenant, num_tokens=len(tokens), must_answer=True)
        assert task_id is not None  # narrowing: must_answer
        return task_id

    def _refuse_swa(self, swa_aware: bool) -> None:
        if swa_aware:
            raise NotImplementedError("swa_aware: sliding-window layer groups are not available in this version")

    def _launch_part(
        self, task_id: int, mask: NDArray[np.bool_], slot_mapping: ArrayLike, token_mask: NDArray[np.bool_] | None
    ) -> int:
        try:
            self.launch([task_id], [part_of_mapping(slot_mapping, mask, token_mask)])
        except FlexKVError:
            self.cancel(task_id)
            raise
        return task_id

    # ---- tasks, pins, counts ----------------------------------------------------------------------------------

    def task_match(self, task_id: int) -> MatchResult | None:
        """The match of a get: number of blocks found, the reason why no more were found, and the time of that reason.
        None: the task is not known."""
        return self.blocks.task_match(task_id)

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for tasks, at most ``timeout`` seconds; each result is returned once.

        A task that still runs after ``timeout`` has the status TIMEOUT; it continues, and can be waited for again. A
        task that took longer than ``op_timeout_s`` (TIMEOUT) or was cancelled (CANCELLED) may still access its pages
        for a moment. With ``completely`` its result comes only when it does not access them any more.
        """
        return self.blocks.wait(task_ids, timeout, completely)

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """Results of the tasks that have ended, without waiting; each result is returned once."""
        return self.blocks.try_wait(task_ids)

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Stop tasks: copies that have not started never start; copies under way are finished (see ``wait``)."""
        self.blocks.cancel(task_ids)

    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """Keep the blocks of a prefix that are cached now, on any tier, until ``unpin`` or ``reset``. Raises PinError
        if that is impossible. ``name`` is the argument of ``unpin``; empty: a name is generated. See ``Blocks``."""
        return self.blocks.pin(token_ids, namespace, name)

    def unpin(self, name: str) -> Pin:
        """Release a pinned prefix: its blocks may be evicted again. Raises PinError if no pin has that name."""
        return self.blocks.unpin(name)

    def pins(self) -> list[Pin]:
        """The pinned prefixes."""
        return self.blocks.pins()

    def stats(self) -> dict[str, int]:
        """Current counts of the index, the SSD tier and the tasks, and counts of matches by reason since the start."""
        return self.blocks.stats()

    def check_integrity(self) -> None:
        """Raise InvariantError if the index or the slots are not consistent."""
        self.blocks.check_integrity()


__all__ = ["KVManager", "KVResponse", "KVResponseStatus"]
