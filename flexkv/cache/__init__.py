"""Control plane: the index of all blocks; plans of loads and saves; eviction."""
