"""Eviction policies, one a file."""

from flexkv.cache.eviction.lru import LRU
from flexkv.cache.eviction.policy import EvictionPolicy
from flexkv.errors import ConfigError

POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU}


def make_policy(name: str, hit_reward_seconds: float) -> EvictionPolicy:
    """Make the policy that the setting ``eviction_policy`` names."""
    try:
        return POLICIES[name](hit_reward_seconds)
    except KeyError:
        raise ConfigError("eviction_policy", name, f"one of {', '.join(sorted(POLICIES))}") from None


__all__ = ["LRU", "POLICIES", "EvictionPolicy", "make_policy"]
