"""A space: one domain of a controller, with its keys, quotas, index, tasks and tiers."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher, chain_seed, hash_blocks
from flexkv.cache.admission.load_or_compute import LoadOrCompute
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import policy_class
from flexkv.cache.quotas import Quotas
from flexkv.config import CacheConfig, changed_domain
from flexkv.controller.tasks.arguments import extras_of, namespace_of, tokens_of
from flexkv.controller.tasks.table import TaskTable
from flexkv.controller.tiering import Tiering
from flexkv.errors import ArgumentError
from flexkv.metrics.match_counts import MatchCounts
from flexkv.storage.host_pool import HostPool
from flexkv.storage.store import TierKind
from flexkv.transfer.engine import TransferEngine

_MAX_SEEDS = 256
"""Chain seeds of namespaces that are remembered; to make one costs as much as all checks of a request."""


class Space:
    """Wires the index, the tasks and the tiers of one domain to the data plane. Thread safe.

    Parameters
    ----------
    config : CacheConfig
    domain : bytes
        Identity of everything that must be equal for KV to be comparable.
    transfer : TransferEngine
        Data plane; must not be started yet.
    dp_client_id : int
        Data-parallel client whose ranks move the blocks.
    accept_within_s : float
        As in ``TaskTable``.
    tiers : sequence of TierKind
        The tiers below host memory, the fastest first.
    on_ready : callable
        Called once, when the host pool exists and each lower tier is open or cannot be opened.

    Attributes
    ----------
    index : GlobalCacheEngine or None
        None until the host pool exists, because the size of a slot is not known before.
    tiering : Tiering or None
        None: there is no tier below host memory.
    tasks : TaskTable
    counts : MatchCounts
    num_tenants : int
        Number of quotas; a tenant is a number below it.
    """

    def __init__(
        self, config: CacheConfig, domain: bytes, transfer: TransferEngine, dp_client_id: int, accept_within_s: float,
        tiers: Sequence[TierKind] = (), on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._domain = domain
        self._transfer = transfer
        self._on_ready = on_ready
        self._make_policy = partial(
            policy_class(config.eviction_policy), hit_reward_seconds=config.hit_reward_seconds
        )
        self._quotas = Quotas(config.quotas)
        self._chain_seed = lru_cache(_MAX_SEEDS)(chain_seed)
        self.num_tenants = len(self._quotas)
        self.index: GlobalCacheEngine | None = None
        self._tiers = list(tiers)
        self._load_or_compute = LoadOrCompute(
            config.load_policy, config.tokens_per_block, config.prefill_tokens_per_s
        )
        self.tiering = Tiering(config, domain, tiers, on_ready) if tiers else None
        self.tasks = TaskTable(transfer, dp_client_id, config.tokens_per_block, self.tiering, accept_within_s)
        self.counts = MatchCounts()

    def grow(self, pool: HostPool, num_slots: int) -> None:
        """Record that the pool has ``num_slots`` usable slots. The first call makes the index and the lower tiers."""
        is_first = self.index is None
        if self.index is None:
            config = self._config
            self.index = GlobalCacheEngine(
                pool.num_slots, self._make_policy, config.evict_start_threshold, config.evict_ratio,
                lower={tier.name: tier.num_bytes(config) // pool.slot_bytes for tier in self._tiers},
                quotas=self._quotas, max_pinned_share=config.max_pinned_share, load_or_compute=self._load_or_compute,
            )
        self.index.grow(num_slots)
        self._transfer.notify()
        if self.tiering is not None:
            self.tiering.grow(self.index, self._transfer, pool, num_slots)
        elif is_first:
            self._on_ready()

    def run_background_work(self) -> float:
        """End overdue tasks, abandon reads that hang, start write-backs; returns the seconds until the next call."""
        pause = self.tasks.run_background_work()
        if self.tiering is None:
            return pause
        if self.index is not None:
            self.tiering.abandon_reads_that_hang(self.index)
        return min(pause, self.tiering.run_background_work())

    def reset(self, timeout_s: float, new_weights: bool) -> None:
        """Drop all KV and all pins, and wait at most ``timeout_s`` seconds for tasks to settle; see
        ``Blocks.reset``."""
        if new_weights:
            self._domain = changed_domain(self._domain)
        if self.index is not None:
            self.index.reset()
        if self.tiering is not None:
            self.tiering.reset()
        self.tasks.wait(self.tasks.reset(), timeout_s, self.tasks.is_settled)

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """Set the measured speed of the engine's prefill; no effect if the setting ``prefill_tokens_per_s`` is
        given."""
        if self._config.prefill_tokens_per_s:
            return
        if self.index is None:
            self._load_or_compute.prefill_tokens_per_s = tokens_per_s
        else:
            self.index.set_prefill_rate(tokens_per_s)

    # ---- keys -------------------------------------------------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None) -> SequenceHasher:
        """Make a hasher for a growing sequence in a namespace; ArgumentError if the namespace is invalid."""
        return SequenceHasher(self._seed(namespace), self._config.tokens_per_block)

    def keys(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None, extras: Mapping[int, bytes] | None
    ) -> NDArray[np.uint64]:
        """(n, 2) uint64: keys of the whole blocks of a sequence; arguments as in ``Blocks.keys``. ArgumentError if one
        is invalid."""
        seed = self._seed(namespace)
        tokens, extras = tokens_of(token_ids), extras_of(extras)
        try:
            return hash_blocks(tokens, self._config.tokens_per_block, seed, extras=extras)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"token_ids: {error}") from error

    def _seed(self, namespace: Sequence[str] | None) -> bytes:
        return self._chain_seed(self._domain, namespace_of(namespace), self._config.secret)

    def tenant(self, namespace: Sequence[str] | None) -> int:
        """Number of the quota that blocks of a namespace count against; ArgumentError if the namespace is invalid."""
        return self._quotas.tenant(namespace_of(namespace))

    # ---- counts -----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Current counts of the index, the lower tiers and the tasks; counts of matches since the start."""
        return {
            **(self.index.stats() if self.index is not None else {}),
            **(self.tiering.stats() if self.tiering is not None else {}),
            **self.counts.stats(),
            "tasks": len(self.tasks),
            "provisional_puts": self.tasks.num_provisional,
        }
