"""The node of the radix tree, as all modules of the index see it."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_TIERS = 3                     # at most 7: one byte has a bit for each, and HAS_HOLE

cdef struct Node:
    uint64_t *keys                    # one allocation: keys, slots of each tier, reference counts, state
    uint64_t came_as                  # its first key when it came to a tier last
    double last_access
    double priority[MAX_TIERS]            # among evictable nodes, the lowest is evicted first; set by the policy
    int32_t parent
    int32_t first_child
    int32_t next_sibling              # of a free node: the next free node
    int32_t prev_sibling
    uint32_t length                   # blocks in the node; 0: root or free
    uint32_t capacity                 # blocks allocated
    uint32_t depth                    # blocks above the node
    uint32_t hits
    uint32_t referenced               # blocks with at least one reference
    uint32_t resident[MAX_TIERS]      # blocks with a slot on the tier, ready or being written
    uint32_t ready[MAX_TIERS]
    uint32_t live_children[MAX_TIERS]  # children whose subtree holds anything on the tier
    uint32_t hits_told[MAX_TIERS]     # hits that the policy knows of
    uint32_t mark[MAX_TIERS]          # the policy's own
    int32_t heap_at[MAX_TIERS]        # place in its heap, from 1; 0: it is in none
    uint32_t pins                     # of all its blocks: they do not expire
    uint16_t tenant                   # tenant of its namespace
    uint8_t queue[MAX_TIERS]
    uint8_t lives[MAX_TIERS]          # how often it is spared
    uint8_t changed                   # bit t: is in the list of nodes that the policy of tier t has yet to place
    uint8_t is_new                    # bit t: has come to tier t since
    uint8_t placed                    # bit t: has a priority
    uint8_t parked                    # bit t: cannot be evicted for now, though nothing is below it
