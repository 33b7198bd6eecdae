from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t


cdef extern from "agent.h" nogil:
    enum flexkv_kind:
        FLEXKV_D2H
        FLEXKV_H2D
        FLEXKV_P2D

    enum:
        FLEXKV_MSG_OP
        FLEXKV_MSG_CANCEL
        FLEXKV_MSG_RESULT
        FLEXKV_NOTE_POPULATED
        FLEXKV_NOTE_ALL_POPULATED
        FLEXKV_NOTE_LOWERED
        FLEXKV_NOTE_USABLE
        FLEXKV_NOTE_LOAD_FENCE
        FLEXKV_NOTE_SAVE_FENCE
        FLEXKV_NOTE_EXCHANGE
        FLEXKV_NOTE_EXCHANGE_OVER
        FLEXKV_NOTE_FOLLOWED
        FLEXKV_NOTE_TAKES_PART
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
        uint32_t groups

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

    struct flexkv_spans:
        uint32_t first
        uint32_t count

    struct flexkv_pages:
        uint8_t *pool
        uint64_t slot_bytes
        uint64_t num_slots
        const flexkv_region *regions
        uint32_t num_regions
        const flexkv_span *spans
        uint32_t num_spans
        flexkv_spans moves[4]
        flexkv_spans layers
        flexkv_spans shares
        const uint64_t *num_pages
        uint32_t num_groups
        uint64_t block_bytes

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
        uint32_t groups
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
    uint64_t flexkv_agent_lowered(const flexkv_agent *agent)
    void flexkv_agent_report(flexkv_agent *agent, uint32_t note, uint64_t value)
    int flexkv_agent_peers_released(const flexkv_agent *agent)
    flexkv_outcome *flexkv_agent_take(flexkv_agent *agent)
    int flexkv_agent_wait(flexkv_agent *agent, int timeout_ms)
    int flexkv_agent_wait_span(flexkv_agent *agent, uint64_t task_id, uint32_t span, int timeout_ms)
    void flexkv_agent_set_signals(flexkv_agent *agent, const flexkv_signals *signals)
    int flexkv_agent_status(flexkv_agent *agent)
    int flexkv_agent_stop(flexkv_agent *agent)
