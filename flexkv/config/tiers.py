"""The kinds of tiers below host memory, the fastest first."""

LOWER_TIERS = ("flexkv.storage.ssd.tier:SSD",)
"""``module:name`` of each ``TierKind``. A tier is in use if its settings give it a size."""
