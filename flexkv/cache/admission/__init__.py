"""Admission: the blocks that are written to a lower tier, and the blocks that are loaded instead of computed."""
