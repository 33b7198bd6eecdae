"""Every request is counted once, under one reason."""

from flexkv.cache.plan import MatchResult
from flexkv.cache.reasons import MissReason
from flexkv.metrics.match_counts import MatchCounts


def test_full_partial_and_missed() -> None:
    counts = MatchCounts()
    counts.count(MatchResult(4, MissReason.FULL_HIT, num_to_fetch=2), 0, 4)
    counts.count(MatchResult(3, MissReason.EVICTED), 0, 4)
    counts.count(MatchResult(2, MissReason.EXPIRED), 2, 4)      # of what was wanted nothing is there
    counts.count(MatchResult(0, MissReason.NEVER_SEEN), 0, 4)
    counts.count(MatchResult(1, MissReason.NEVER_SEEN), 3, 4)   # not even what the engine has
    counts.count(MatchResult(0, MissReason.NEVER_SEEN), 0, 0)   # wanted nothing
    told = {name: count for name, count in counts.stats().items() if count}
    assert told == {
        "full_hits": 1, "partial_evicted": 1, "miss_expired": 1, "miss_never_seen": 2,
        "queried_blocks": 4 + 4 + 2 + 4 + 1, "hit_blocks": 4 + 3, "hit_blocks_on_ssd": 2,
    }
    assert set(counts.stats()) == {
        "full_hits", "queried_blocks", "hit_blocks", "hit_blocks_on_ssd",
        *(f"{kind}_{reason.name.lower()}" for kind in ("miss", "partial") for reason in MissReason
          if reason is not MissReason.FULL_HIT)
    }
