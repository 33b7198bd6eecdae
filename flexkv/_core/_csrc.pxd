from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "ring.h" nogil:
    enum:
        FLEXKV_RING_HEADER

    struct flexkv_ring:
        pass

    struct flexkv_part:
        const void *data
        uint32_t size

    int flexkv_ring_create(void *memory, uint64_t size)
    int flexkv_ring_attach(flexkv_ring *ring, void *memory, uint64_t size, int event_fd)
    uint64_t flexkv_ring_max_record(const flexkv_ring *ring)
    int flexkv_ring_push(flexkv_ring *ring, uint32_t type, const flexkv_part *parts, int num_parts,
                         uint64_t reserve)
    int64_t flexkv_ring_pop(flexkv_ring *ring, uint32_t *type, void *buffer, uint64_t size)
    int flexkv_ring_set_waiting(flexkv_ring *ring, int waiting)
    int flexkv_ring_readable(const flexkv_ring *ring)
    void flexkv_ring_note(flexkv_ring *ring, uint32_t index, uint64_t value)
    uint64_t flexkv_ring_read_note(const flexkv_ring *ring, uint32_t index)


cdef extern from "cuda_api.h" nogil:
    struct cu_context_s:
        pass
    struct cu_stream_s:
        pass
    struct cu_event_s:
        pass
    struct cu_module_s:
        pass
    struct cu_function_s:
        pass
    ctypedef cu_context_s *cu_context
    ctypedef cu_stream_s *cu_stream
    ctypedef cu_event_s *cu_event
    ctypedef cu_module_s *cu_module
    ctypedef cu_function_s *cu_function

    enum:
        CU_STREAM_NON_BLOCKING
        CU_EVENT_DISABLE_TIMING
        CU_ERROR_INVALID_VALUE
        CU_MEMORYTYPE_DEVICE
        CU_POINTER_MEMORY_TYPE
        CU_POINTER_DEVICE_ORDINAL
        CU_POINTER_IPC_CAPABLE
        CU_IPC_LAZY_PEER_ACCESS
        CU_HANDLE_FILE_DESCRIPTOR
        CU_LOCATION_DEVICE
        CU_ACCESS_READ_WRITE

    struct cu_uuid:
        unsigned char bytes[16]
    struct cu_ipc_handle:
        char bytes[64]
    struct cu_location:
        unsigned int type
        int id
    struct cu_allocation_properties:
        unsigned int handle_types
        cu_location location
    struct cu_access:
        cu_location location
        unsigned int flags

    struct flexkv_cuda:
        int (*cuGetErrorName)(int error, const char **name)
        int (*cuGetErrorString)(int error, const char **text)
        int (*cuDriverGetVersion)(int *version)
        int (*cuDeviceGet)(int *device, int ordinal)
        int (*cuDeviceGetCount)(int *count)
        int (*cuDeviceGetUuid)(cu_uuid *uuid, int device)
        int (*cuDeviceGetAttribute)(int *value, int attribute, int device)
        int (*cuDevicePrimaryCtxRetain)(cu_context *context, int device)
        int (*cuCtxPushCurrent)(cu_context context)
        int (*cuCtxPopCurrent)(cu_context *context)
        int (*cuModuleLoadData)(cu_module *module, const void *image)
        int (*cuModuleGetFunction)(cu_function *function, cu_module module, const char *name)
        int (*cuMemGetAddressRange)(uint64_t *base, size_t *num_bytes, uint64_t ptr)
        int (*cuPointerGetAttribute)(void *value, int attribute, uint64_t ptr)
        int (*cuIpcGetMemHandle)(cu_ipc_handle *handle, uint64_t ptr)
        int (*cuIpcOpenMemHandle)(uint64_t *ptr, cu_ipc_handle handle, unsigned int flags)
        int (*cuIpcCloseMemHandle)(uint64_t ptr)
        int (*cuMemRetainAllocationHandle)(uint64_t *allocation, void *ptr)
        int (*cuMemGetAllocationPropertiesFromHandle)(cu_allocation_properties *properties, uint64_t allocation)
        int (*cuMemExportToShareableHandle)(void *handle, uint64_t allocation, int type, unsigned long long flags)
        int (*cuMemImportFromShareableHandle)(uint64_t *allocation, void *handle, int type)
        int (*cuMemRelease)(uint64_t allocation)
        int (*cuMemAddressReserve)(uint64_t *ptr, size_t num_bytes, size_t alignment, uint64_t wish,
                                   unsigned long long flags)
        int (*cuMemAddressFree)(uint64_t ptr, size_t num_bytes)
        int (*cuMemMap)(uint64_t ptr, size_t num_bytes, size_t offset, uint64_t allocation, unsigned long long flags)
        int (*cuMemUnmap)(uint64_t ptr, size_t num_bytes)
        int (*cuMemSetAccess)(uint64_t ptr, size_t num_bytes, const cu_access *access, size_t count)
        int (*cuMemAlloc)(uint64_t *ptr, size_t num_bytes)
        int (*cuMemFree)(uint64_t ptr)
        int (*cuCtxGetStreamPriorityRange)(int *least, int *greatest)
        int (*cuStreamCreateWithPriority)(cu_stream *stream, unsigned int flags, int priority)
        int (*cuStreamDestroy)(cu_stream stream)
        int (*cuStreamSynchronize)(cu_stream stream) noexcept nogil
        int (*cuStreamWaitEvent)(cu_stream stream, cu_event event, unsigned int flags)
        int (*cuEventCreate)(cu_event *event, unsigned int flags)
        int (*cuEventDestroy)(cu_event event)
        int (*cuEventRecord)(cu_event event, cu_stream stream)
        int (*cuMemcpyAsync)(uint64_t dst, uint64_t src, size_t num_bytes, cu_stream stream) noexcept nogil
        int (*cuLaunchKernel)(cu_function function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                              unsigned int by, unsigned int bz, unsigned int shared_bytes, cu_stream stream,
                              void **parameters, void **extra) noexcept nogil
        void *cuMemcpyBatchAsync


cdef extern from "agent.h" nogil:
    enum flexkv_kind:
        FLEXKV_D2H
        FLEXKV_H2D

    enum:
        FLEXKV_MSG_OP
        FLEXKV_MSG_CANCEL
        FLEXKV_MSG_RESULT
        FLEXKV_NOTE_POPULATED
        FLEXKV_NOTE_ALL_POPULATED
        FLEXKV_NOTE_USABLE
        FLEXKV_NOTE_LOAD_FENCE
        FLEXKV_NOTE_SAVE_FENCE
        FLEXKV_FAREWELL

    struct flexkv_msg_op:
        uint64_t op_id
        uint64_t task_id
        uint64_t fence
        uint32_t kind
        uint32_t count
        uint32_t op_blocks
        uint32_t flags
        uint32_t counter
        uint32_t pad

    struct flexkv_msg_cancel:
        uint64_t op_id

    struct flexkv_msg_result:
        uint64_t op_id
        uint32_t first
        uint32_t count
        uint32_t last

    struct flexkv_region:
        uint64_t base

    struct flexkv_span:
        uint32_t first

    struct flexkv_pages:
        uint8_t *pool
        uint64_t slot_bytes
        uint64_t num_slots
        uint64_t segment_offset
        const flexkv_region *regions
        uint32_t num_regions
        const flexkv_span *spans
        uint32_t num_spans
        uint64_t num_pages

    struct flexkv_backend:
        void *context

    const flexkv_backend flexkv_host_backend

    struct flexkv_agent_options:
        flexkv_pages at
        flexkv_backend backend
        void *submissions
        void *completions
        uint64_t ring_bytes
        int submission_event_fd
        int completion_event_fd
        int socket_fd
        int keep_outcomes
        uint32_t rest_timeout_ms

    struct flexkv_outcome:
        uint64_t task_id
        uint32_t kind
        uint32_t count
        uint32_t op_blocks
        const int32_t *pages
        const uint8_t *ok

    struct flexkv_signals:
        const int *fds
        const uint32_t *span_of
        uint32_t num_counters
        uint32_t num_layers

    struct flexkv_agent:
        pass

    int flexkv_agent_start(flexkv_agent **agent, const flexkv_agent_options *options)
    void flexkv_agent_advance(flexkv_agent *agent, uint64_t load_fence, uint64_t save_fence)
    uint64_t flexkv_agent_populated(const flexkv_agent *agent, int *all)
    void flexkv_agent_report_usable(flexkv_agent *agent, uint64_t slots)
    flexkv_outcome *flexkv_agent_take(flexkv_agent *agent)
    int flexkv_agent_wait(flexkv_agent *agent, int timeout_ms)
    int flexkv_agent_wait_span(flexkv_agent *agent, uint64_t task_id, uint32_t span, int timeout_ms)
    void flexkv_agent_set_signals(flexkv_agent *agent, const flexkv_signals *signals)
    int flexkv_agent_status(flexkv_agent *agent)
    int flexkv_agent_stop(flexkv_agent *agent)


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
    uint64_t flexkv_cuda_copy_registered(const flexkv_cuda_copy *copy, int *more)
    int flexkv_cuda_copy_fence(flexkv_cuda_copy *copy, flexkv_kind kind, uint64_t fence, cu_stream stream)
    int flexkv_cuda_copy_follow(flexkv_cuda_copy *copy, uint32_t span, cu_stream stream)
    int flexkv_cuda_copy_error(flexkv_cuda_copy *copy, const char **function)
    void flexkv_cuda_copy_destroy(flexkv_cuda_copy *copy)
    flexkv_backend flexkv_cuda_backend(flexkv_cuda_copy *copy)


cdef extern from "io_queue.h" nogil:
    enum flexkv_io_kind:
        FLEXKV_IO_READ
        FLEXKV_IO_WRITE

    struct flexkv_io_method:
        pass

    struct flexkv_io_faults:
        pass

    struct flexkv_io_options:
        uint8_t *memory
        uint64_t memory_bytes
        const int *files
        uint32_t num_files
        uint32_t depth
        uint64_t deadline_ns
        const flexkv_io_method *method
        flexkv_io_faults *faults

    struct flexkv_io_pieces:
        uint64_t count
        flexkv_io_kind kind
        uint64_t size
        const uint64_t *tags
        const int32_t *files
        const int64_t *file_offsets
        const int64_t *memory_offsets

    struct flexkv_io_queue:
        pass

    int flexkv_io_queue_open(flexkv_io_queue **result, const flexkv_io_options *options)
    int flexkv_io_queue_event_fd(const flexkv_io_queue *queue)
    void flexkv_io_queue_register(flexkv_io_queue *queue, uint64_t upto_bytes)
    uint64_t flexkv_io_queue_registered(flexkv_io_queue *queue, int *error)
    int flexkv_io_queue_submit(flexkv_io_queue *queue, const flexkv_io_pieces *pieces)
    int flexkv_io_queue_cancel(flexkv_io_queue *queue, const uint64_t *tags, uint64_t count)
    uint64_t flexkv_io_queue_ready(flexkv_io_queue *queue)
    uint64_t flexkv_io_queue_take(flexkv_io_queue *queue, uint64_t max, uint64_t *tags, int32_t *results,
                                  uint64_t *checksums)
    uint64_t flexkv_io_queue_busy(flexkv_io_queue *queue, uint64_t max, uint64_t *tags)
    uint64_t flexkv_io_queue_close(flexkv_io_queue *queue)


cdef extern from "io_method.h" nogil:
    const flexkv_io_method flexkv_io_uring
    const flexkv_io_method flexkv_io_threads


cdef extern from "io_faulty.h" nogil:
    enum flexkv_io_fault:
        FLEXKV_IO_FAILS
        FLEXKV_IO_SHORT
        FLEXKV_IO_HANGS

    const flexkv_io_method flexkv_io_faulty

    int flexkv_io_faults_create(flexkv_io_faults **result, const flexkv_io_method *inner)
    int flexkv_io_faults_plan(flexkv_io_faults *faults, flexkv_io_kind kind, int32_t file, flexkv_io_fault fault,
                              int64_t amount, uint32_t count)
    void flexkv_io_faults_release(flexkv_io_faults *faults)
    uint32_t flexkv_io_faults_left(flexkv_io_faults *faults)
    void flexkv_io_faults_free(flexkv_io_faults *faults)
