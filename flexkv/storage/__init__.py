"""Storage of block bytes: the layout of a slot, and the tiers that hold slots."""
