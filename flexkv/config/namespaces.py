"""The setting ``namespaces``: what each namespace may have."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexkv.config.field import nearest
from flexkv.errors import ConfigError

DEFAULT = ""
"""The namespace of those who have no quota of their own: they share one. In settings ``default`` means it too."""

_ALIAS = "default"


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


_NAMES = [field.name for field in dataclasses.fields(Quota)]


def read_quotas(given: Mapping[str, Any]) -> dict[str, Quota]:
    """Quotas by namespace, as a user writes them.

    Raises
    ------
    ConfigError
        Naming the namespace and what is wrong.
    """
    quotas: dict[str, Quota] = {}
    for name, values in given.items():
        if not isinstance(name, str):
            raise ConfigError("namespaces", name, "a name must be text; put it in quotes")
        key, name = f"namespaces: {name}", DEFAULT if name == _ALIAS else name
        if name in quotas:
            raise ConfigError(key, values, f"the same as {DEFAULT!r}: give one of them")
        if not isinstance(values, Mapping):
            raise ConfigError(key, values, f"must be a mapping with some of {', '.join(_NAMES)}")
        for field, value in values.items():
            if field not in _NAMES:
                hint = nearest(str(field), _NAMES)
                raise ConfigError(f"{key}: {field}", value, f"is none of {', '.join(_NAMES)}{hint}")
            kinds = (int,) if field == "priority" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{key}: {field}", value, f"must be a {'whole ' if len(kinds) == 1 else ''}number")
        quotas[name] = Quota(**values)
    check_quotas(quotas)
    return quotas


def check_quotas(quotas: Mapping[str, Quota]) -> None:
    """Raise ConfigError unless each quota is possible, and all of them are together."""
    for name, quota in quotas.items():
        if not 0 <= quota.guaranteed <= quota.limit <= 1 or quota.limit == 0 or not quota.ttl_s > 0:
            raise ConfigError(
                f"namespaces: {name or _ALIAS}", quota, "must be 0 <= guaranteed <= limit <= 1, and limit and ttl_s > 0"
            )
    if (total := sum(quota.guaranteed for quota in quotas.values())) > 1 + 1e-9:
        raise ConfigError("namespaces", f"{total:g} guaranteed in all", "at most 1: nobody can have more than all")
