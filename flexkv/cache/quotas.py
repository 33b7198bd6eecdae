"""Quotas: the share of a tier that each namespace may use, for how long, and the order in which namespaces yield."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.config.namespace_entry import namespace_entries, parse_owner
from flexkv.config.namespaces import DEFAULT, Quota, check_quotas


def _part(share: float, capacity: int) -> int:
    return math.floor(share * capacity + 1e-9)


class Quotas:
    """Quotas by namespace. A *tenant* is the number of a quota; all namespaces without a quota of their own share
    tenant 0.

    Parameters
    ----------
    quotas : mapping of str to Quota
        Quota of each namespace; ``""``: of all others together.

    Raises
    ------
    ConfigError
        A quota is impossible, or all of them together are.
    """

    def __init__(self, quotas: Mapping[str, Quota] | None = None) -> None:
        quotas = dict(quotas or {})
        check_quotas(quotas)
        self._quotas: Sequence[Quota] = [quotas.pop(DEFAULT, Quota()), *quotas.values()]
        self._names = [DEFAULT, *quotas]
        self._tenants = {parse_owner(name): number for number, name in enumerate(quotas, 1)}
        self.ttl_s = [quota.ttl_s for quota in self._quotas]

    def __len__(self) -> int:
        return len(self._quotas)

    def tenant(self, namespace: Sequence[str] | None) -> int:
        """The tenant of a request: the tenant of the first entry of its namespace whose kind and name have a quota."""
        if not namespace:
            return 0
        owners = (entry.owner for entry in namespace_entries(namespace))
        return next((self._tenants[owner] for owner in owners if owner in self._tenants), 0)

    def names(self) -> list[str]:
        """Name of the namespace of each tenant, by its number; ``""`` for tenant 0."""
        return list(self._names)

    def limit(self, tenant: int, capacity: int) -> int:
        """Maximum number of blocks of a tenant on a tier of ``capacity`` blocks."""
        return _part(self._quotas[tenant].limit, capacity)

    def guaranteed(self, tenant: int, capacity: int) -> int:
        """Number of blocks, on a tier of ``capacity`` blocks, that no other tenant can take from a tenant."""
        return _part(self._quotas[tenant].guaranteed, capacity)

    def may_pin(self, pinned: Sequence[int], capacity: int) -> bool:
        """Whether each tenant stays within its limit and keeps its guaranteed blocks if ``pinned[tenant]`` blocks of
        each tenant are pinned."""
        guaranteed = [self.guaranteed(tenant, capacity) for tenant in range(len(self))]
        return sum(max(have, mine) for have, mine in zip(pinned, guaranteed, strict=True)) <= capacity and all(
            have <= self.limit(tenant, capacity) for tenant, have in enumerate(pinned)
        )

    def victims(self, used: NDArray[np.int64], capacity: int, requester: int | None) -> Iterator[tuple[int, int]]:
        """Tenants to evict from, in order, with the maximum number of blocks to evict from each.

        Tenants above their guarantee come first, the lowest priority first, and of equal priority the tenant that is
        furthest above. The requester comes last. So only its own requests can push a tenant below its guarantee.

        Parameters
        ----------
        used : (tenants,) int64
            Blocks of each tenant on the tier.
        requester : int, optional
            Tenant of the blocks that need slots.
        """
        borrowed = [int(count) - self.guaranteed(tenant, capacity) for tenant, count in enumerate(used)]
        order = sorted(range(len(borrowed)), key=lambda tenant: (self._quotas[tenant].priority, -borrowed[tenant]))
        yield from ((tenant, borrowed[tenant]) for tenant in order if borrowed[tenant] > 0)
        if requester is not None:
            yield requester, int(used[requester])
