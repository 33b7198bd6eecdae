"""Control plane: which blocks are where, what to load, what to keep."""
