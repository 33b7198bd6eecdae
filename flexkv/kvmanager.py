"""KVManager: what an engine calls to load and save KV. Wires index, data plane and tasks together."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.block_table import pages_from_slot_mapping
from flexkv._core.hashing import SequenceHasher, chain_seed, hash_blocks
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import policy_class
from flexkv.cache.plan import MatchResult
from flexkv.cache.reasons import StopReason
from flexkv.cache.trace import make_recorder
from flexkv.config import CacheConfig, ModelConfig, TransferConfig, domain, load_config, runtime_directory
from flexkv.errors import SlotMappingError
from flexkv.kvtask import KVTask, TaskTable, tokens_and_start
from flexkv.response import KVResponse, KVResponseStatus
from flexkv.tiering import Tiering, make_ssd_store
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.layerwise import MAX_COUNTERS
from flexkv.transfer.ssd import MakeStore


class KVManager:
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
    ) -> None:
        if event_collector is not None:
            raise NotImplementedError("event_collector: KV events are not available in this version; pass None")
        self._cache_config = cache_config
        self._tokens_per_block = cache_config.tokens_per_block
        self._domain = domain(model_config, cache_config)
        self._make_policy = partial(
            policy_class(cache_config.eviction_policy), hit_reward_seconds=cache_config.hit_reward_seconds
        )
        self._cache: GlobalCacheEngine | None = None
        self._tiering = Tiering(cache_config, self._domain, make_store) if cache_config.ssd_bytes else None
        transfer_config = transfer_config or load_config().transfer
        self._host_only = transfer_config.enable_layerwise_transfer
        default_port = f"ipc://{runtime_directory()}/register-{dp_client_id}.sock"
        port = gpu_register_port or transfer_config.gpu_register_port or default_port
        transfer_config = transfer_config.replace(gpu_register_port=port)
        self._transfer = TransferEngine(
            transfer_config,
            host_bytes=cache_config.host_bytes,
            num_slots=cache_config.num_cpu_blocks,
            ranks=model_config.tp_size * model_config.pp_size,
            dp_client_ids=(dp_client_id,),
            hugepage_bytes=cache_config.hugepage_bytes,
            on_capacity=self._on_capacity,
            housekeeping=self._tiering.keep_house if self._tiering is not None else None,
        )
        self._tasks = TaskTable(self._transfer, dp_client_id, self._tokens_per_block, self._tiering)
        self.recorder = make_recorder(cache_config)      # adapters that match by keys tell it of each request

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for the ranks; returns at once. The host pool is made when all of them have registered."""
        self._transfer.start()

    def is_ready(self) -> bool:
        """Whether every rank has registered, so that KV can be loaded and saved."""
        return self._transfer.is_ready and self._cache is not None

    def shutdown(self) -> None:
        """Write what is queued for SSD, cancel what is under way, give all that it holds back. May be repeated."""
        if self._tiering is not None:
            self._tiering.shutdown()
        self._transfer.shutdown()
        self.recorder.close()

    def reset(self, timeout: float = 5.0) -> None:
        """Forget all cached KV, as after a change of weights. Nothing put before it is ever returned after it.

        Tasks that are matched or running are cancelled; ``timeout`` bounds the wait for them (seconds).
        """
        if self._cache is not None:
            self._cache.reset()
        if self._tiering is not None:
            self._tiering.reset()
        unsettled = self._tasks.unsettled()
        self.cancel(unsettled)
        self._tasks.wait(unsettled, timeout, self._tasks.is_settled)

    def _on_capacity(self, num_slots: int) -> None:
        if self._cache is None:
            pool = self._transfer.host_pool
            config = self._cache_config
            self._cache = GlobalCacheEngine(
                pool.num_slots, self._make_policy, config.evict_start_threshold, config.evict_ratio,
                num_ssd_slots=config.ssd_bytes // pool.slot_bytes,
            )
        self._cache.grow(num_slots)
        if self._tiering is not None:
            self._tiering.grow(self._cache, self._transfer, num_slots)

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
        """Find what can be loaded, and hold it until ``launch`` or ``cancel``.

        Parameters
        ----------
        token_ids : (num_tokens,) int32 or int64
            The sequence from its first token.
        token_mask : (num_tokens,) bool, optional
            False for the leading tokens whose KV the engine has; a block is loaded only as a whole.
        cpu_only : bool
            Only what is in host memory now (``prefetch_async`` brings the rest there). So it is for every match where
            ``enable_layerwise_transfer`` is set: a read of SSD may fail, and layers cannot report that.
        namespace : sequence of str, optional
            LoRA, cache salt, tenant: KV is shared only between equal namespaces.
        block_extras : mapping from block index to bytes, optional
            What else than tokens a block depends on, such as multimodal content.

        Returns
        -------
        task_id : int
        mask : (num_tokens,) bool
            Tokens that ``launch`` will load.
        """
        self._refuse_swa(swa_aware)
        tokens, start = tokens_and_start(token_ids, token_mask, self._tokens_per_block)
        keys = self._keys(tokens, namespace, block_extras)
        self.recorder.record(keys)
        task = self._tasks.new_get(self._cache, keys, start, None, len(tokens), host_only=cpu_only or self._host_only)
        return task.task_id, task.token_mask()

    def put_match(
        self,
        token_ids: ArrayLike,
        token_mask: NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
        *,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> tuple[int, NDArray[np.bool_]]:
        """Reserve room for what is not cached yet, until ``launch`` or ``cancel``; arguments as ``get_match``.

        Returns
        -------
        task_id : int
        mask : (num_tokens,) bool
            Tokens that ``launch`` will save.
        """
        tokens, start = tokens_and_start(token_ids, token_mask, self._tokens_per_block)
        keys = self._keys(tokens, namespace, block_extras)
        task = self._tasks.new_put(self._cache, keys, start, len(keys), len(tokens))
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
            Accepted; the data plane takes what is queued together anyway.
        layerwise_transfer : bool
            Loads go layer by layer, and each rank's eventfds of ``counter_id`` (from 0) are told of each layer that is
            there (``enable_layerwise_transfer``). Layers of a load that fails are never told of.
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
        KeyError
            A task is not known, or was launched already; no task of the call was launched.
        """
        if swa_slot_mappings is not None:
            raise NotImplementedError("sliding-window transfers are not available in this version")
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        mappings = [slot_mappings] if isinstance(task_ids, int) else list(slot_mappings)  # type: ignore[arg-type]
        if layerwise_transfer and not (len(ids) == 1 and 0 <= counter_id < MAX_COUNTERS):
            raise ValueError(f"layerwise: launch one task at a time, with a counter_id of 0 to {MAX_COUNTERS - 1}")
        if len(ids) != len(mappings):
            raise SlotMappingError(f"{len(mappings)} slot mappings for {len(ids)} tasks: give one for each")
        tasks = [self._tasks.matched(task_id) for task_id in ids]
        pages = [self._pages(task, mapping) for task, mapping in zip(tasks, mappings, strict=True)]
        for task, task_pages in zip(tasks, pages, strict=True):
            self._tasks.run(task, task_pages, fence, layerwise_transfer, counter_id + 1 if layerwise_transfer else 0)
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
        """Bring blocks of slower tiers into host memory; the task ends when they are there, its mask tells which."""
        self._refuse_swa(swa_aware)
        tokens = np.asarray(token_ids)
        return self._tasks.prefetch(self._cache, self._keys(tokens, namespace, None), len(tokens))

    def _refuse_swa(self, swa_aware: bool) -> None:
        if swa_aware:
            raise NotImplementedError("swa_aware: sliding-window groups are not available in this version")

    def _keys(
        self, tokens: NDArray[np.integer], namespace: Sequence[str] | None, extras: Mapping[int, bytes] | None
    ) -> NDArray[np.uint64]:
        seed = chain_seed(self._domain, tuple(namespace or ()), self._cache_config.secret)
        return hash_blocks(tokens, self._tokens_per_block, seed, extras=extras, secret=self._cache_config.secret)

    def _pages(self, task: KVTask, slot_mapping: object) -> NDArray[np.int32]:
        pages = pages_from_slot_mapping(np.asarray(slot_mapping), self._tokens_per_block)
        if len(pages) != len(task.blocks):
            raise SlotMappingError(
                f"task {task.task_id} moves {len(task.blocks)} blocks of {self._tokens_per_block} tokens; "
                f"its slot mapping has {len(pages)}: give one slot for each True of the mask"
            )
        return pages

    def _launch_part(
        self, task_id: int, mask: NDArray[np.bool_], slot_mapping: ArrayLike, token_mask: NDArray[np.bool_] | None
    ) -> int:
        mapping = np.asarray(slot_mapping)
        try:
            if mapping.shape == mask.shape:
                mapping = mapping[mask]
            elif token_mask is not None and mapping.shape == (int(token_mask.sum()),):
                mapping = mapping[mask[token_mask]]
            else:
                raise SlotMappingError(
                    f"slot_mapping has shape {mapping.shape}; give a slot for each of the {len(mask)} tokens"
                )
            self.launch([task_id], [mapping])
        except SlotMappingError:
            self.cancel(task_id)
            raise
        return task_id

    # ---- blocks: the API that this package's adapters use ------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """A hasher of growing sequences whose keys this manager understands."""
        seed = chain_seed(self._domain, tuple(namespace or ()), self._cache_config.secret)
        return SequenceHasher(seed, self._tokens_per_block, self._cache_config.secret)

    def lookup(self, keys: NDArray[np.uint64], start_block: int = 0) -> MatchResult:
        """How many leading blocks of ``keys`` ((n, 2) uint64) can be loaded, and why no more. Holds nothing.

        ``start_block``: those before it are not to be loaded.
        """
        cache = self._cache
        return cache.match(keys, start_block) if cache is not None else MatchResult(0, StopReason.NEVER_SEEN)

    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False,
    ) -> int:
        """Load blocks ``[start_block, start_block + len(pages))`` of a sequence into ``pages``.

        A block that is not ready fails, and with it the task; the others are loaded. ``layerwise``: for
        ``KVTPClient.follow_load``; what is not in host memory fails, for later loads must not pass this one.
        """
        task = self._tasks.new_get(self._cache, keys, start_block, start_block + len(pages), 0, host_only=layerwise)
        self._tasks.run(task, pages, fence, layerwise)
        return task.task_id

    def prefetch_blocks(self, keys: NDArray[np.uint64], start_block: int = 0) -> int:
        """Bring blocks of a sequence from there on into host memory; the task ends when they are there."""
        return self._tasks.prefetch(self._cache, keys, 0, start_block)

    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0
    ) -> int | None:
        """Save those of the blocks ``[start_block, start_block + len(pages))`` that are absent; None if none is."""
        task = self._tasks.new_put(self._cache, keys, start_block, start_block + len(pages), 0)
        if len(task.blocks) == 0:
            self._tasks.cancel(task.task_id)
            return None
        self._tasks.run(task, pages[task.blocks - start_block], fence)
        return task.task_id

    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """Positions in its sequence of the blocks that a running task moves."""
        return self._tasks.blocks(task_id)

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """How fast the engine computes prompts, as its adapter measures it; the configuration's rate wins."""
        if self._tiering is not None:
            self._tiering.set_prefill_rate(tokens_per_s)

    # ---- results ----------------------------------------------------------------------------------------------

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for tasks, at most ``timeout`` seconds; a result is given once.

        ``completely`` waits, after a transfer was reported late or cancelled, until nothing touches its pages.
        """
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        self._tasks.wait(ids, timeout, self._tasks.is_settled if completely else self._tasks.has_result)
        return {task_id: self._tasks.take(task_id) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """Results of those of the tasks that have ended, without waiting; a result is given once."""
        self._transfer.poll()
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        return {task_id: self._tasks.take(task_id) for task_id in ids if self._tasks.is_settled(task_id)}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Stop tasks: what has not started never will; what is being copied now is finished first (see ``wait``)."""
        for task_id in [task_ids] if isinstance(task_ids, int) else list(task_ids):
            self._tasks.cancel(task_id)

    def stats(self) -> dict[str, int]:
        """Counts of the index, of the SSD tier and of the tasks, now."""
        return {
            **(self._cache.stats() if self._cache is not None else {}),
            **(self._tiering.stats() if self._tiering is not None else {}),
            "tasks": len(self._tasks),
        }

    def check_integrity(self) -> None:
        """Raise InvariantError if the index or the slots are not consistent."""
        if self._cache is not None:
            self._cache.check_integrity()


__all__ = ["KVManager", "KVResponse", "KVResponseStatus"]
