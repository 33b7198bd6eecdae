"""How much of a tier each namespace may have, for how long, and who gives way to whom."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import ConfigError

DEFAULT = ""
"""The namespace of those who have no quota of their own: they share one."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a namespace may have.

    Attributes
    ----------
    guaranteed : float
        Share of each tier that no other namespace can take from it. More is borrowed while nobody needs it.
    limit : float
        Share of each tier that it never exceeds.
    priority : int
        Of those who have borrowed, the one with the lowest priority gives back first.
    ttl_s : float
        Seconds after its last use that a block is offered.
    """

    guaranteed: float = 0.0
    limit: float = 1.0
    priority: int = 0
    ttl_s: float = math.inf


class Quotas:
    """Quotas by namespace; a *group* is the number of one, 0 that of all namespaces without a quota of their own.

    Parameters
    ----------
    quotas : mapping of str to Quota
        By namespace; ``""``: of all others together.

    Raises
    ------
    ConfigError
    """

    def __init__(self, quotas: Mapping[str, Quota] | None = None) -> None:
        quotas = dict(quotas or {})
        self._quotas: Sequence[Quota] = [quotas.pop(DEFAULT, Quota()), *quotas.values()]
        self._groups = {name: number for number, name in enumerate(quotas, 1)}
        for name, quota in zip([DEFAULT, *quotas], self._quotas, strict=True):
            if not 0 <= quota.guaranteed <= quota.limit <= 1 or quota.limit == 0 or not quota.ttl_s > 0:
                raise ConfigError(f"namespaces: {name!r}", quota, "0 <= guaranteed <= limit <= 1, limit and ttl_s > 0")
        if (total := sum(quota.guaranteed for quota in self._quotas)) > 1 + 1e-9:
            raise ConfigError("namespaces", f"{total:g} guaranteed in all", "at most 1: nobody can have more than all")
        self.ttl_s = [quota.ttl_s for quota in self._quotas]

    def __len__(self) -> int:
        return len(self._quotas)

    def group(self, namespace: str) -> int:
        """The group of a namespace."""
        return self._groups.get(namespace, 0)

    def names(self) -> list[str]:
        """The namespace of each group."""
        return [DEFAULT, *self._groups]

    def limit(self, group: int, capacity: int) -> int:
        """How many of ``capacity`` blocks a group may have."""
        return int(self._quotas[group].limit * capacity)

    def victims(self, used: NDArray[np.int64], capacity: int, requester: int | None) -> Iterator[tuple[int, int]]:
        """Groups that give way, in turn, and how many blocks each can be made to give.

        First those who have borrowed, by priority, and of equals who borrowed most; then the requester itself. So
        nobody is pushed under what is guaranteed but by its own requests.

        Parameters
        ----------
        used : (groups,) int64
            Blocks of each group on the tier.
        requester : int, optional
            Group of the blocks that room is made for.
        """
        borrowed = [
            int(count) - int(quota.guaranteed * capacity) for quota, count in zip(self._quotas, used, strict=True)
        ]
        order = sorted(range(len(borrowed)), key=lambda group: (self._quotas[group].priority, -borrowed[group]))
        yield from ((group, borrowed[group]) for group in order if borrowed[group] > 0)
        if requester is not None:
            yield requester, int(used[requester])
