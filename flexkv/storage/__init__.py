"""Where block bytes rest: the layout of a slot, and the tiers that hold slots."""
