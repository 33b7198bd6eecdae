"""The lower tiers that a configuration uses."""

from flexkv.config import CacheConfig
from flexkv.config.tiers import LOWER_TIERS
from flexkv.storage.ssd.tier import SSD
from flexkv.storage.tiers import tiers_of


def test_a_tier_is_in_use_if_it_has_a_size() -> None:
    assert tiers_of(CacheConfig(cpu_cache_gb=1)) == []
    assert tiers_of(CacheConfig(cpu_cache_gb=1, ssd_cache_gb=2)) == [SSD]


def test_the_kinds_are_listed_by_their_names_and_have_no_size_by_default() -> None:
    assert list(LOWER_TIERS) == [SSD.name]
    assert SSD.num_bytes(CacheConfig()) == 0
    assert SSD.closed_stats(CacheConfig()) == {"directories": 1, "directories_usable": 0}
