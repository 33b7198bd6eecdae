/* The backend of an agent whose pages are in the memory of its process. */
#include "agent.h"

#include <string.h>

#define BATCH_BYTES (1u << 20)    /* copied by the CPU between two looks at cancels and at the socket */

/* The CPU as the device: a window has arrived when start returns. */
static int copy_with_cpu(void *context, const struct flexkv_pages *at, enum flexkv_kind kind, uint64_t fence,
                         uint32_t span, const int32_t *slots, const int32_t *pages, uint32_t count)
{
    uint32_t batch = BATCH_BYTES / at->slot_bytes + 1;
    const struct flexkv_region *first = at->regions + at->spans[span].first;
    const struct flexkv_region *end = first + at->spans[span].num_regions;

    (void)context;
    (void)fence;
    count = count < batch ? count : batch;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *slot = at->pool + (uint64_t)slots[i] * at->slot_bytes;

        for (const struct flexkv_region *region = first; region < end; region++) {
            uint8_t *page = (uint8_t *)(region->base + (uint64_t)(pages[i] * region->page_stride));

            if (kind == FLEXKV_P2D)
                memcpy(page, (uint8_t *)(region->slot_offset + (uint64_t)pages[i] * at->spans[span].peer_stride),
                       region->chunk_bytes);
            else if (kind == FLEXKV_D2H)
                memcpy(slot + region->slot_offset, page, region->chunk_bytes);
            else
                memcpy(page, slot + region->slot_offset, region->chunk_bytes);
        }
    }
    return (int)count;
}

static int arrived(void *context, enum flexkv_kind kind)
{
    (void)context;
    (void)kind;
    return 1;
}

const struct flexkv_backend flexkv_host_backend = { NULL, copy_with_cpu, NULL, arrived, NULL, NULL };
