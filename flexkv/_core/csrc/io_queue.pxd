from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "io_queue.h" nogil:
    enum flexkv_io_kind:
        FLEXKV_IO_READ
        FLEXKV_IO_WRITE

    struct flexkv_io_method:
        pass

    struct flexkv_io_options:
        uint8_t *memory
        uint64_t memory_bytes
        const int *files
        uint32_t num_files
        uint32_t depth
        uint64_t deadline_ns
        const flexkv_io_method *method

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
