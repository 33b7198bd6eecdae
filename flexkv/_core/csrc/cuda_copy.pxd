from libc.stdint cimport uint32_t, uint64_t

from flexkv._core.csrc.agent cimport flexkv_backend, flexkv_kind, flexkv_pages
from flexkv._core.csrc.cuda_api cimport cu_context, cu_function, cu_stream, flexkv_cuda


cdef extern from "cuda_copy.h" nogil:
    struct flexkv_cuda_options:
        cu_context context
        cu_function move
        uint64_t window_bytes
        uint32_t num_ctas
        uint32_t strategy

    struct flexkv_cuda_copy:
        pass

    int flexkv_cuda_copy_create(flexkv_cuda_copy **result, const flexkv_cuda *api, const flexkv_cuda_options *options,
                                const flexkv_pages *at, int *error)
    int flexkv_cuda_copy_register(flexkv_cuda_copy *copy, uint64_t populated, int all, int *error)
    int flexkv_cuda_copy_unregister(flexkv_cuda_copy *copy, uint64_t keep, int *error)
    uint64_t flexkv_cuda_copy_registered(const flexkv_cuda_copy *copy, int *more)
    int flexkv_cuda_copy_fence(flexkv_cuda_copy *copy, flexkv_kind kind, uint64_t fence, cu_stream stream)
    int flexkv_cuda_copy_follow(flexkv_cuda_copy *copy, uint32_t span, cu_stream stream)
    int flexkv_cuda_copy_error(flexkv_cuda_copy *copy, const char **function)
    void flexkv_cuda_copy_destroy(flexkv_cuda_copy *copy)
    flexkv_backend flexkv_cuda_backend(flexkv_cuda_copy *copy)
