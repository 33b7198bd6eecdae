"""Data plane: moves blocks between pages and slots, and between tiers."""
