"""The lower tiers that a configuration uses."""

from flexkv.config import CacheConfig
from flexkv.config.tiers import LOWER_TIERS
from flexkv.storage.ssd.tier import SSD
from flexkv.storage.tiers import tiers_of


def test_a_tier_is_in_use_if_it_has_a_size() -> None:
    assert tiers_of(CacheConfig(cpu_cache_gb=1)) == []
    assert tiers_of(CacheConfig(cpu_cache_gb=1, ssd_cache_gb=2)) == [SSD]


def test_every_kind_has_a_name_of_its_own_and_no_size_by_default() -> None:
    assert len(LOWER_TIERS) == len({path.partition(":")[2] for path in LOWER_TIERS})
    assert SSD.num_bytes(CacheConfig()) == 0
    assert SSD.closed_stats(CacheConfig()) == {"directories": 1, "directories_usable": 0}
