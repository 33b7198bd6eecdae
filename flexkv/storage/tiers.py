"""The kinds of lower tiers that a configuration uses."""

import importlib

from flexkv.config import CacheConfig
from flexkv.config.tiers import LOWER_TIERS
from flexkv.storage.store import TierKind


def tiers_of(config: CacheConfig) -> list[TierKind]:
    """The lower tiers in use, the fastest first."""
    kinds: list[TierKind] = []
    for path in LOWER_TIERS.values():
        module, _, name = path.partition(":")
        kind = getattr(importlib.import_module(module), name)
        if kind.num_bytes(config):
            kinds.append(kind)
    return kinds
