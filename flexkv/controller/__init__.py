"""Decides for one engine: the index, its tasks, its tiers, and the ranks that register."""
