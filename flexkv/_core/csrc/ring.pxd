from libc.stdint cimport int64_t, uint32_t, uint64_t


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
