/* The backend of the device agent for NVIDIA GPUs. */
#ifndef FLEXKV_CUDA_COPY_H
#define FLEXKV_CUDA_COPY_H

#include "agent.h"
#include "cuda_api.h"

enum flexkv_strategy { FLEXKV_AUTO, FLEXKV_STAGED, FLEXKV_DIRECT, FLEXKV_BATCH };

struct flexkv_cuda_options {
    cu_context context;
    cu_function move;             /* flexkv_move_blocks */
    uint64_t window_bytes;        /* size of one staging buffer */
    uint32_t num_ctas;            /* thread blocks of the kernel */
    uint32_t strategy;            /* enum flexkv_strategy */
};

struct flexkv_cuda_copy;

/* Create the backend. `api` and everything that `at` points to must stay until flexkv_cuda_copy_destroy. Returns 0 or
 * negative errno; -EIO: *error is the CUDA error. */
int flexkv_cuda_copy_create(struct flexkv_cuda_copy **result, const struct flexkv_cuda *api,
                            const struct flexkv_cuda_options *options, const struct flexkv_pages *at,
                            cu_result *error);

/* Pin the next part of the first `populated` slots of the pool. Pins whole parts only, unless `all` is set: no further
 * slots will be populated. Returns 1, 0 if there is nothing to pin now, or -EAGAIN: copies last too long, try again; the
 * agent must be woken after 1 and -EAGAIN. -EIO with *error: no further part is pinned;
 * copies of the other slots are slow, not wrong. Must be called by one thread at a time. */
int flexkv_cuda_copy_register(struct flexkv_cuda_copy *copy, uint64_t populated, int all, cu_result *error);

/* Unpin the last part, if it is beyond the first `keep` slots, which must be whole parts. No copy of its slots may be
 * under way. Returns 1, 0 if nothing beyond is pinned, or -EAGAIN as above; another negative errno, then and ever after:
 * a part cannot be unpinned, because of *error, or because it also holds slots that are kept. The agent must be woken
 * after all but 0. By the thread that registers. */
int flexkv_cuda_copy_unregister(struct flexkv_cuda_copy *copy, uint64_t keep, cu_result *error);

/* Number of slots that are pinned, from the first of the pool on; *more: further slots will be pinned. */
uint64_t flexkv_cuda_copy_registered(const struct flexkv_cuda_copy *copy, int *more);

/* Make ops of `kind` with a fence of at most `fence` wait for the work that `stream` holds now. Must be called before
 * the agent advances to `fence`; fences only grow. */
cu_result flexkv_cuda_copy_fence(struct flexkv_cuda_copy *copy, enum flexkv_kind kind, uint64_t fence,
                                 cu_stream stream);

/* Make the stream wait for the loads of the span that flexkv_agent_wait_span has waited for. */
cu_result flexkv_cuda_copy_follow(struct flexkv_cuda_copy *copy, uint32_t span, cu_stream stream);

/* The first CUDA error of a copy and the function that returned it, or CU_SUCCESS. */
cu_result flexkv_cuda_copy_error(struct flexkv_cuda_copy *copy, const char **function);

/* Free everything. Must be called after the agent has stopped. */
void flexkv_cuda_copy_destroy(struct flexkv_cuda_copy *copy);

struct flexkv_backend flexkv_cuda_backend(struct flexkv_cuda_copy *copy);

#endif
