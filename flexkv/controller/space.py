"""A space: one domain of a controller, with its quotas, index and tiers."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from flexkv.cache.admission.load_or_compute import LoadOrCompute
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import policy_class
from flexkv.cache.quotas import Quotas
from flexkv.config import CacheConfig
from flexkv.controller.tasks.arguments import namespace_of
from flexkv.controller.tiering import Tiering
from flexkv.metrics.match_counts import MatchCounts
from flexkv.storage.host_pool import HostPool
from flexkv.storage.store import TierKind
from flexkv.transfer.engine import TransferEngine


class Space:
    """Wires the index and the tiers of one domain to the data plane. Thread safe.

    Parameters
    ----------
    config : CacheConfig
    domain : bytes
        Identity of everything that must be equal for KV to be comparable.
    transfer : TransferEngine
        Data plane; must not be started yet.
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
    counts : MatchCounts
    num_tenants : int
        Number of quotas; a tenant is a number below it.
    """

    def __init__(
        self, config: CacheConfig, domain: bytes, transfer: TransferEngine, tiers: Sequence[TierKind] = (),
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._transfer = transfer
        self._on_ready = on_ready
        self._make_policy = partial(
            policy_class(config.eviction_policy), hit_reward_seconds=config.hit_reward_seconds
        )
        self._quotas = Quotas(config.quotas)
        self.num_tenants = len(self._quotas)
        self.index: GlobalCacheEngine | None = None
        self._tiers = list(tiers)
        self._load_or_compute = LoadOrCompute(
            config.load_policy, config.tokens_per_block, config.prefill_tokens_per_s
        )
        self.tiering = Tiering(config, domain, tiers, on_ready) if tiers else None
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

    def withdraw(self, num_slots: int) -> bool:
        """Use no host slot from ``num_slots`` on any more; as ``GlobalCacheEngine.withdraw``."""
        if self.tiering is not None:
            self.tiering.limit(num_slots)
        return self.index is None or self.index.withdraw(num_slots)

    def run_background_work(self) -> float:
        """Abandon reads that hang, and start write-backs; returns the seconds until the next call."""
        if self.tiering is None:
            return math.inf
        if self.index is not None:
            self.tiering.abandon_reads_that_hang(self.index)
        return self.tiering.run_background_work()

    def reset(self) -> None:
        """Forget all KV. Tasks that were planned before must be cancelled then."""
        if self.index is not None:
            self.index.reset()
        if self.tiering is not None:
            self.tiering.reset()

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """Set the measured speed of the engine's prefill; no effect if the setting ``prefill_tokens_per_s`` is
        given."""
        if self._config.prefill_tokens_per_s:
            return
        if self.index is None:
            self._load_or_compute.prefill_tokens_per_s = tokens_per_s
        else:
            self.index.set_prefill_rate(tokens_per_s)

    # ---- counts -----------------------------------------------------------------------------------------------

    def tenant(self, namespace: Sequence[str] | None) -> int:
        """Number of the quota that blocks of a namespace count against; ArgumentError if the namespace is invalid."""
        return self._quotas.tenant(namespace_of(namespace))

    def stats(self) -> dict[str, int]:
        """Current counts of the index and the lower tiers; counts of matches since the start."""
        return {
            **(self.index.stats() if self.index is not None else {}),
            **(self.tiering.stats() if self.tiering is not None else {}),
            **self.counts.stats(),
        }
