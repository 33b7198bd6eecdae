"""The setting ``namespaces``: the quota of each namespace."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexkv.config.field import is_plain_text, nearest
from flexkv.config.namespace_entry import parse_owner
from flexkv.config.values import read_number
from flexkv.errors import ConfigError

DEFAULT = ""
"""Name of the quota that all namespaces without a quota of their own share; in settings also ``default``."""

_ALIAS = "default"


@dataclass(frozen=True, slots=True)
class Quota:
    """Quota of a namespace.

    Attributes
    ----------
    guaranteed : float
        Share of each tier that no other namespace can take from it. It may borrow more while slots are free.
    limit : float
        Maximum share of each tier.
    priority : int
        Namespaces that have borrowed slots yield in order of priority, the lowest first.
    ttl_s : float
        Time after its last use for which a block is offered, in seconds.
    """

    guaranteed: float = 0.0
    limit: float = 1.0
    priority: int = 0
    ttl_s: float = math.inf


_KINDS: dict[str, type] = {"guaranteed": float, "limit": float, "priority": int, "ttl_s": float}
_UNITS = {"ttl_s": "s"}
_MAX_PRIORITY = 1_000_000_000


def read_quotas(given: Mapping[str, Any]) -> dict[str, Quota]:
    """Quotas by namespace, as a user writes them.

    Raises
    ------
    ConfigError
        A quota is wrong; the message names the namespace and the key.
    """
    quotas: dict[str, Quota] = {}
    owners: dict[tuple[str, str], str] = {}
    for name, values in given.items():
        if not isinstance(name, str) or not is_plain_text(name):
            raise ConfigError("namespaces", name, "a name must be text; put it in quotes")
        key, name = f"namespaces: {name}", DEFAULT if name == _ALIAS else name
        if (other := owners.setdefault(parse_owner(name), key)) != key:
            other = other.removeprefix("namespaces: ")
            raise ConfigError(key, values, f"means the same as {other!r}: give one of them")
        if not isinstance(values, Mapping):
            raise ConfigError(key, values, f"must be a mapping with some of {', '.join(_KINDS)}")
        quotas[name] = Quota(**{field: _read_number(key, field, value) for field, value in values.items()})
    check_quotas(quotas)
    return quotas


def _read_number(key: str, field: Any, value: Any) -> Any:
    if not isinstance(field, str) or field not in _KINDS:
        raise ConfigError(f"{key}: {field}", value, f"is not one of {', '.join(_KINDS)}{nearest(str(field), _KINDS)}")
    kind = _KINDS[field]
    number = read_number(value, kind, _UNITS.get(field, "")) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int,) if kind is int else (int, float)):
        raise ConfigError(f"{key}: {field}", value, f"must be a {'whole ' if kind is int else ''}number")
    if kind is int and abs(number) > _MAX_PRIORITY:
        raise ConfigError(f"{key}: {field}", value, f"must be from -{_MAX_PRIORITY} to {_MAX_PRIORITY}")
    try:
        return kind(number)
    except OverflowError:
        raise ConfigError(f"{key}: {field}", value, "is too large") from None


def check_quotas(quotas: Mapping[str, Quota]) -> None:
    """Raise ConfigError unless each quota is possible, and all of them are together."""
    for name, quota in quotas.items():
        if not 0 <= quota.guaranteed <= quota.limit <= 1 or quota.limit == 0 or not quota.ttl_s > 0:
            raise ConfigError(
                f"namespaces: {name or _ALIAS}", quota, "must be 0 <= guaranteed <= limit <= 1, and limit and ttl_s > 0"
            )
    if (total := sum(quota.guaranteed for quota in quotas.values())) > 1 + 1e-9:
        raise ConfigError.about(
            "namespaces", f"{total:g} guaranteed in all: guaranteed shares may add up to 1 at most; lower some"
        )
