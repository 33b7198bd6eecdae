"""Which block is where: the radix tree, eviction queues, free slots, block keys."""
