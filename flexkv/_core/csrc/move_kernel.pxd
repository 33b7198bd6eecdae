from libc.stdint cimport int32_t, uint32_t, uint64_t

from flexkv._core.csrc.cuda_api cimport cu_function, cu_stream, flexkv_cuda


cdef extern from "move_kernel.h" nogil:
    enum:
        FLEXKV_MOVE_BLOCKS

    struct flexkv_move:
        cu_function function
        uint64_t regions
        uint32_t num_regions
        uint64_t max_chunk
        uint32_t num_ctas
        uint64_t far
        uint64_t far_stride
        int gather
        const int32_t *slots
        const int32_t *pages
        uint32_t count

    int flexkv_launch_move(const flexkv_cuda *api, const flexkv_move *move, cu_stream stream)
