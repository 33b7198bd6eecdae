#include "ring.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>

#define PAD_TYPE 0xffffffffu

struct record {
    uint32_t size;                /* of the payload */
    uint32_t type;
};

_Static_assert(sizeof(struct flexkv_ring_shared) <= FLEXKV_RING_HEADER, "the header is larger than its place");

static uint64_t padded(uint64_t size)
{
    return sizeof(struct record) + ((size + 7) & ~7ull);
}

int flexkv_ring_create(void *memory, uint64_t size)
{
    struct flexkv_ring_shared *shared = memory;
    uint64_t capacity = size - FLEXKV_RING_HEADER;

    if (size <= FLEXKV_RING_HEADER || capacity & (capacity - 1) || capacity < 4096)
        return -EINVAL;
    shared->capacity = capacity;
    shared->magic = FLEXKV_RING_MAGIC;
    atomic_store(&shared->waiting, 1);
    return 0;
}

int flexkv_ring_attach(struct flexkv_ring *ring, void *memory, uint64_t size, int event_fd)
{
    struct flexkv_ring_shared *shared = memory;

    if (size <= FLEXKV_RING_HEADER || shared->magic != FLEXKV_RING_MAGIC ||
        shared->capacity != size - FLEXKV_RING_HEADER)
        return -EBADMSG;
    ring->shared = shared;
    ring->data = (uint8_t *)memory + FLEXKV_RING_HEADER;
    ring->capacity = size - FLEXKV_RING_HEADER;
    ring->mine = 0;
    ring->event_fd = event_fd;
    return 0;
}

uint64_t flexkv_ring_max_record(const struct flexkv_ring *ring)
{
    return ring->capacity / 2 - sizeof(struct record);
}

int flexkv_ring_push(struct flexkv_ring *ring, uint32_t type, const struct flexkv_part *parts, int num_parts,
                     uint64_t reserve)
{
    uint64_t tail = atomic_load_explicit(&ring->mine, memory_order_relaxed), mask = ring->capacity - 1;
    uint64_t need, room, until_end, size = 0;
    uint64_t head = atomic_load_explicit(&ring->shared->head, memory_order_acquire);
    struct record record;
    uint8_t *at;

    for (int i = 0; i < num_parts; i++)
        size += parts[i].size;
    if (size > flexkv_ring_max_record(ring))
        return -EMSGSIZE;
    if (head > tail || tail - head > ring->capacity)
        return -EBADMSG;
    need = padded(size);
    room = ring->capacity - (tail - head);
    until_end = ring->capacity - (tail & mask);
    if (need > until_end) {       /* a record is contiguous: fill up to the end, go on at the start */
        if (need + until_end + reserve > room)
            return -ENOSPC;
        record = (struct record){ (uint32_t)(until_end - sizeof(record)), PAD_TYPE };
        memcpy(ring->data + (tail & mask), &record, sizeof(record));
        tail += until_end;
    } else if (need + reserve > room) {
        return -ENOSPC;
    }
    record = (struct record){ (uint32_t)size, type };
    at = ring->data + (tail & mask);
    memcpy(at, &record, sizeof(record));
    at += sizeof(record);
    for (int i = 0; i < num_parts; i++) {
        if (parts[i].size)
            memcpy(at, parts[i].data, parts[i].size);
        at += parts[i].size;
    }
    tail += need;
    atomic_store_explicit(&ring->mine, tail, memory_order_relaxed);
    /* seq_cst, as the consumer's store to `waiting`: one of the two sees the other, so no wake-up is lost */
    atomic_store(&ring->shared->tail, tail);
    if (atomic_load(&ring->shared->waiting) && atomic_exchange(&ring->shared->waiting, 0))
        eventfd_write(ring->event_fd, 1);
    return 0;
}

int flexkv_ring_readable(const struct flexkv_ring *ring)
{
    return atomic_load(&ring->shared->tail) != atomic_load_explicit(&ring->mine, memory_order_relaxed);
}

int64_t flexkv_ring_pop(struct flexkv_ring *ring, uint32_t *type, void *buffer, uint64_t size)
{
    uint64_t mask = ring->capacity - 1, tail = atomic_load(&ring->shared->tail), left, until_end;
    uint64_t head = atomic_load_explicit(&ring->mine, memory_order_relaxed);
    struct record record;

    for (;;) {
        if (tail == head)
            return -EAGAIN;
        left = tail - head;
        until_end = ring->capacity - (head & mask);
        if (left > ring->capacity || left < sizeof(record) || head & 7)
            return -EBADMSG;
        memcpy(&record, ring->data + (head & mask), sizeof(record));
        if (padded(record.size) > left || padded(record.size) > until_end)
            return -EBADMSG;
        if (record.type != PAD_TYPE)
            break;
        head += padded(record.size);
        atomic_store_explicit(&ring->mine, head, memory_order_relaxed);
    }
    if (record.size > size)
        return -EBADMSG;
    memcpy(buffer, ring->data + (head & mask) + sizeof(record), record.size);
    *type = record.type;
    head += padded(record.size);
    atomic_store_explicit(&ring->mine, head, memory_order_relaxed);
    atomic_store_explicit(&ring->shared->head, head, memory_order_release);
    return record.size;
}

void flexkv_ring_note(struct flexkv_ring *ring, uint32_t index, uint64_t value)
{
    atomic_store_explicit(&ring->shared->notes[index], value, memory_order_release);
}

uint64_t flexkv_ring_read_note(const struct flexkv_ring *ring, uint32_t index)
{
    return atomic_load_explicit(&ring->shared->notes[index], memory_order_acquire);
}

int flexkv_ring_set_waiting(struct flexkv_ring *ring, int waiting)
{
    atomic_store(&ring->shared->waiting, (uint32_t)waiting);
    return flexkv_ring_readable(ring);
}
