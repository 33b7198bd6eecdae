"""The setting ``server_guarantees``: host memory that models of the daemon keep in any case."""

import math
from collections.abc import Mapping
from typing import Any

from flexkv.config.field import is_plain_text
from flexkv.config.values import read_number
from flexkv.errors import ConfigError

_KEY = "server_guarantees"


def read_guarantees(given: Mapping[str, Any]) -> dict[str, int]:
    """Guaranteed bytes by model, as a user writes them in GiB.

    Raises
    ------
    ConfigError
        A guarantee is wrong; the message names the model.
    """
    guarantees: dict[str, int] = {}
    for model, value in given.items():
        if not isinstance(model, str) or not model or not is_plain_text(model):
            raise ConfigError(_KEY, model, "the name of a model must be text; put it in quotes")
        number = read_number(value, float, "GiB") if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ConfigError(f"{_KEY}: {model}", value, "must be a number above 0 (GiB)")
        guarantees[model] = int(number * (1 << 30))
    return guarantees


def check_guarantees(
    guarantees: Mapping[str, int], host_bytes: int, num_blocks: int | None, max_pools: int, hugepages: bool
) -> None:
    """Raise ConfigError unless the daemon can keep all guarantees."""
    if not guarantees:
        return
    if hugepages:
        raise ConfigError.about(_KEY, "needs ordinary pages: pools of hugepages have fixed parts of host memory. Turn "
                                      "use_hugepage_cpu_buffer off, or remove the guarantees")
    if num_blocks is not None:
        raise ConfigError.about(_KEY, "is in GiB, so it needs cpu_cache_gb: set that instead of num_cpu_blocks")
    if max_pools < max(2, len(guarantees)):
        raise ConfigError.about(
            _KEY, f"{len(guarantees)} models with a pool of their own: set server_max_pools to {len(guarantees) + 1} "
                  "or more, so that other models have a pool, too"
        )
    if (total := sum(guarantees.values())) > host_bytes:
        raise ConfigError.about(
            _KEY, f"{total / (1 << 30):g} GiB guaranteed in all, of {host_bytes / (1 << 30):g} (cpu_cache_gb): lower "
                  "some, or raise cpu_cache_gb"
        )
