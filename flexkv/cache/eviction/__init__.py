"""Eviction policies, one a file."""

from flexkv.cache.eviction.adaptive import Adaptive
from flexkv.cache.eviction.arc import ARC
from flexkv.cache.eviction.fifo import FIFO
from flexkv.cache.eviction.filo import FILO
from flexkv.cache.eviction.lfu import LFU
from flexkv.cache.eviction.lru import LRU
from flexkv.cache.eviction.mru import MRU
from flexkv.cache.eviction.policy import Choice, EvictionPolicy
from flexkv.cache.eviction.s3fifo import S3FIFO
from flexkv.cache.eviction.slru import SLRU
from flexkv.errors import ConfigError

POLICIES: dict[str, type[EvictionPolicy]] = {
    "adaptive": Adaptive, "lru": LRU, "lfu": LFU, "slru": SLRU, "fifo": FIFO, "mru": MRU, "filo": FILO,
    "s3fifo": S3FIFO, "arc": ARC,
}


def policy_class(name: str) -> type[EvictionPolicy]:
    """Class of the policy with a name, a value of the setting ``eviction_policy``; ConfigError if there is none."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError("eviction_policy", name, f"one of {', '.join(sorted(POLICIES))}") from None


__all__ = ["ARC", "FIFO", "FILO", "LFU", "LRU", "MRU", "POLICIES", "S3FIFO", "SLRU", "Adaptive", "Choice",
           "EvictionPolicy", "policy_class"]
