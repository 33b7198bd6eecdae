/* Single-producer, single-consumer ring of variable-length records in memory shared by two processes.
 *
 * The other side is not trusted to be sane: a position or length that its writer cannot have written is reported as
 * -EBADMSG and never followed. Records are copied out before they are looked at. */
#ifndef FLEXKV_RING_H
#define FLEXKV_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define FLEXKV_RING_MAGIC 0x34676e72564b5846ull /* "FXKVrng4": the last digit is the version of the records */
#define FLEXKV_RING_HEADER 256                  /* bytes before the data */
#define FLEXKV_RING_NOTES 8

struct flexkv_ring_shared {
    uint64_t magic;
    uint64_t capacity;            /* bytes of data, a power of two */
    uint8_t pad0[48];
    _Atomic uint64_t head;        /* bytes consumed; written by the consumer */
    _Atomic uint32_t waiting;     /* the consumer sleeps, or will: write its eventfd */
    uint8_t pad1[52];
    _Atomic uint64_t tail;        /* bytes produced; written by the producer */
    uint8_t pad2[56];
    _Atomic uint64_t notes[FLEXKV_RING_NOTES]; /* the producer's latest numbers, apart from the records */
};

struct flexkv_ring {
    struct flexkv_ring_shared *shared;
    uint8_t *data;
    uint64_t capacity;            /* own copy: the shared one may be overwritten */
    _Atomic uint64_t mine;        /* own copy of the position that this side writes */
    int event_fd;                 /* the consumer's */
};

struct flexkv_part {              /* a record is given in parts */
    const void *data;
    uint32_t size;
};

/* Lay out an empty ring in `size` bytes of zeroed memory: -EINVAL unless size - FLEXKV_RING_HEADER is a power of two. */
int flexkv_ring_create(void *memory, uint64_t size);

/* Use a ring: -EBADMSG if there is none of that size. */
int flexkv_ring_attach(struct flexkv_ring *ring, void *memory, uint64_t size, int event_fd);

/* Largest record that can be pushed, in bytes. */
uint64_t flexkv_ring_max_record(const struct flexkv_ring *ring);

/* Producer. 0, -ENOSPC (try again when the consumer has read), -EMSGSIZE (never fits), -EBADMSG. After the record there is
 * room for `reserve` more bytes of records, their headers and padding included. */
int flexkv_ring_push(struct flexkv_ring *ring, uint32_t type, const struct flexkv_part *parts, int num_parts,
                     uint64_t reserve);

/* Consumer. Bytes of the record copied to `buffer`, -EAGAIN (empty), -EBADMSG (corrupt, or larger than `size`). */
int64_t flexkv_ring_pop(struct flexkv_ring *ring, uint32_t *type, void *buffer, uint64_t size);

/* Consumer. Ask for (or waive) a write to the eventfd at the next push; 1 if there is something to read already. */
int flexkv_ring_set_waiting(struct flexkv_ring *ring, int waiting);

/* Producer. Publish a number; it replaces the one before it, and the consumer reads it when it wants to. */
void flexkv_ring_note(struct flexkv_ring *ring, uint32_t index, uint64_t value);

/* Consumer. The producer's number; it can be any number, since the producer is not trusted. */
uint64_t flexkv_ring_read_note(const struct flexkv_ring *ring, uint32_t index);

/* Any thread of the consumer, also beside a pop by another thread. 1 if there is something to read. */
int flexkv_ring_readable(const struct flexkv_ring *ring);

#endif
