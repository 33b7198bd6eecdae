"""The kinds of tiers below host memory, the fastest first."""

LOWER_TIERS = {"ssd": "flexkv.storage.ssd.tier:SSD"}
"""Name of each tier, which is the prefix of its statistics, and ``module:name`` of its ``TierKind``. A tier is in use
if its settings give it a size."""
