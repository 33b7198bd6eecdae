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
    int flexkv_ring_push(flexkv_ring *ring, uint32_t type, const flexkv_part *parts, int num_parts)
    int64_t flexkv_ring_pop(flexkv_ring *ring, uint32_t *type, void *buffer, uint64_t size)
    int flexkv_ring_set_waiting(flexkv_ring *ring, int waiting)
    int flexkv_ring_readable(const flexkv_ring *ring)


cdef extern from "agent.h" nogil:
    enum:
        FLEXKV_MSG_OP
        FLEXKV_MSG_CANCEL
        FLEXKV_MSG_RESULT

    struct flexkv_msg_op:
        uint64_t op_id
        uint64_t task_id
        uint64_t fence
        uint32_t kind
        uint32_t count
        uint32_t op_blocks
        uint32_t cancelled

    struct flexkv_msg_cancel:
        uint64_t op_id

    struct flexkv_msg_result:
        uint64_t op_id
        uint32_t first
        uint32_t count
        uint32_t last

    struct flexkv_region:
        uint64_t base

    struct flexkv_pages:
        uint8_t *pool
        uint64_t slot_bytes
        uint64_t num_slots
        uint64_t segment_offset
        const flexkv_region *regions
        uint32_t num_regions
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

    struct flexkv_outcome:
        uint64_t task_id
        uint32_t kind
        uint32_t count
        uint32_t op_blocks
        const int32_t *pages
        const uint8_t *ok

    struct flexkv_agent:
        pass

    int flexkv_agent_start(flexkv_agent **agent, const flexkv_agent_options *options)
    void flexkv_agent_advance(flexkv_agent *agent, uint64_t load_fence, uint64_t save_fence)
    flexkv_outcome *flexkv_agent_take(flexkv_agent *agent)
    int flexkv_agent_wait(flexkv_agent *agent, int timeout_ms)
    int flexkv_agent_status(flexkv_agent *agent)
    void flexkv_agent_stop(flexkv_agent *agent)
