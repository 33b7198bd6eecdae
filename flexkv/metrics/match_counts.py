"""How matches ended, counted by reason."""

import threading

from flexkv.cache.plan import MatchResult
from flexkv.cache.reasons import StopReason

_REASONS = [reason for reason in StopReason if reason is not StopReason.FULL_HIT]


class MatchCounts:
    """Every request is counted once: as a full hit, or by the reason of the first block that could not be had, as a
    miss if that was the first one wanted, or else as a partial hit; and the blocks that it wanted and found. Thread
    safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        names = ["full_hits", *(f"{kind}_{reason.name.lower()}" for kind in ("miss", "partial") for reason in _REASONS)]
        self._counts = dict.fromkeys([*names, "queried_blocks", "hit_blocks", "hit_blocks_on_ssd"], 0)

    def count(self, match: MatchResult, start: int, num_blocks: int) -> None:
        """A request wanted blocks ``[start, num_blocks)`` of its sequence; one that wanted none is not counted."""
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
        """Since the start."""
        with self._lock:
            return dict(self._counts)
