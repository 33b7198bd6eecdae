"""Counts of matches by outcome and reason."""

import threading

from flexkv.cache.plan import MatchResult
from flexkv.cache.reasons import MissReason

_REASONS = [reason for reason in MissReason if reason is not MissReason.FULL_HIT]


class MatchCounts:
    """Counts requests, and the blocks that they wanted and found. Thread safe.

    Each request counts once: as a full hit; as a partial hit, by reason; or as a miss, by reason. The reason is that of
    the first missing block. It is a miss if the first block wanted was missing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        names = ["full_hits", *(f"{kind}_{reason.name.lower()}" for kind in ("miss", "partial") for reason in _REASONS)]
        self._counts = dict.fromkeys([*names, "queried_blocks", "hit_blocks", "hit_blocks_on_ssd"], 0)

    def count(self, match: MatchResult, start: int, num_blocks: int) -> None:
        """Count a request that wanted blocks ``[start, num_blocks)`` of its sequence, unless the range is empty."""
        if start >= num_blocks:
            return
        if match.num_ready >= num_blocks:
            name = "full_hits"
        else:
            name = f"{'partial' if match.num_ready > start else 'miss'}_{match.reason.name.lower()}"
        with self._lock:
            self._counts[name] += 1
            self._counts["queried_blocks"] += num_blocks - start
            self._counts["hit_blocks"] += max(0, match.num_ready - start)
            self._counts["hit_blocks_on_ssd"] += match.num_to_fetch

    def stats(self) -> dict[str, int]:
        """Counts since the start."""
        with self._lock:
            return dict(self._counts)
