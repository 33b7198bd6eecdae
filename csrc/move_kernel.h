/* Launches of the kernel that gathers and scatters (move_blocks.cu). */
#ifndef FLEXKV_MOVE_KERNEL_H
#define FLEXKV_MOVE_KERNEL_H

#include "agent.h"
#include "cuda_api.h"

#define FLEXKV_MOVE_BLOCKS 480    /* of one launch, as MAX_BLOCKS in move_blocks.cu */

struct flexkv_move {
    cu_function function;
    cu_ptr regions;               /* of the span, in device memory */
    uint32_t num_regions;
    uint64_t max_chunk;
    uint32_t num_ctas;            /* at most */
    cu_ptr far;                   /* the other side: where block i would begin if i, or slots[i], were 0 */
    uint64_t far_stride;
    int gather;                   /* from the pages; else to them */
    const int32_t *slots;         /* NULL: block i is at i */
    const int32_t *pages;
    uint32_t count;               /* up to FLEXKV_MOVE_BLOCKS */
};

static inline cu_result flexkv_launch_move(const struct flexkv_cuda *api, const struct flexkv_move *move,
                                           cu_stream stream)
{
    enum { PIECE_BYTES = 32768, THREADS = 512 };    /* bytes of a work item of the kernel; threads that move one */
    struct { int32_t pages[FLEXKV_MOVE_BLOCKS], slots[FLEXKV_MOVE_BLOCKS]; } blocks;
    uint64_t piece_bytes = PIECE_BYTES, items;
    uint32_t pieces = (uint32_t)((move->max_chunk + PIECE_BYTES - 1) / PIECE_BYTES), grid;
    uint32_t num_regions = move->num_regions, count = move->count;
    cu_ptr regions = move->regions, far = move->far;
    uint64_t far_stride = move->far_stride;
    int use_slots = move->slots != NULL, gather = move->gather;
    void *parameters[] = { &regions, &num_regions, &count, &pieces, &piece_bytes, &far, &far_stride, &use_slots,
                           &gather, &blocks };

    for (uint32_t i = 0; i < count; i++) {
        blocks.pages[i] = move->pages[i];
        blocks.slots[i] = use_slots ? move->slots[i] : 0;
    }
    items = (uint64_t)count * num_regions * pieces;
    grid = items < move->num_ctas ? (uint32_t)items : move->num_ctas;
    return api->cuLaunchKernel(move->function, grid, 1, 1, THREADS, 1, 1, 0, stream, parameters, NULL);
}

#endif
