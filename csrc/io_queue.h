/* I/O queue: a thread that moves pieces between memory and files, and reports the XXH3-64 of each.
 *
 * A piece is so many bytes that are in one place of a file and in one place of memory. Neighbours of one file become one
 * I/O. Each piece that was submitted has one result; whatever happens, none is lost. Pieces have no order among each
 * other. */
#ifndef FLEXKV_IO_QUEUE_H
#define FLEXKV_IO_QUEUE_H

#include <stdint.h>

enum flexkv_io_kind { FLEXKV_IO_READ = 0, FLEXKV_IO_WRITE = 1 };

struct flexkv_io_method;

struct flexkv_io_options {
    uint8_t *memory;
    uint64_t memory_bytes;
    const int *files;             /* descriptors; the array is copied */
    uint32_t num_files;
    uint32_t depth;               /* I/Os under way, of each file */
    uint64_t deadline_ns;         /* for an I/O to end */
    const struct flexkv_io_method *method;
};

struct flexkv_io_pieces {         /* arrays of `count`; kind and size are common to all */
    uint64_t count;
    enum flexkv_io_kind kind;
    uint64_t size;
    const uint64_t *tags;
    const int32_t *files;
    const int64_t *file_offsets;
    const int64_t *memory_offsets;
};

struct flexkv_io_queue;

/* Memory and descriptors stay the caller's, and must outlive flexkv_io_queue_close. Fails as the method does. */
int flexkv_io_queue_open(struct flexkv_io_queue **result, const struct flexkv_io_options *options);

/* Readable when there are results to take, and when flexkv_io_queue_busy has become less. */
int flexkv_io_queue_event_fd(const struct flexkv_io_queue *queue);

/* The first so many bytes of memory may be registered with the kernel from now on. */
void flexkv_io_queue_register(struct flexkv_io_queue *queue, uint64_t upto_bytes);

/* How much is registered; `error`: 0, or the negative errno for which no more will be. */
uint64_t flexkv_io_queue_registered(struct flexkv_io_queue *queue, int *error);

/* 0, -EINVAL (a piece is outside of memory, or of no file), -ENOMEM: then none of them was taken. Never waits. */
int flexkv_io_queue_submit(struct flexkv_io_queue *queue, const struct flexkv_io_pieces *pieces);

/* Pieces with these tags that have not begun end with -ECANCELED. 0 or -ENOMEM. Never waits. */
int flexkv_io_queue_cancel(struct flexkv_io_queue *queue, const uint64_t *tags, uint64_t count);

/* How many results there are to take. */
uint64_t flexkv_io_queue_ready(struct flexkv_io_queue *queue);

/* Take at most `max` results, oldest first; each array has room for that many. How many were taken. */
uint64_t flexkv_io_queue_take(struct flexkv_io_queue *queue, uint64_t max, uint64_t *tags, int32_t *results,
                              uint64_t *checksums);

/* How many pieces have ended with -ETIMEDOUT while the kernel may still touch their memory; the tags of at most `max`. */
uint64_t flexkv_io_queue_busy(struct flexkv_io_queue *queue, uint64_t max, uint64_t *tags);

/* Wait for pieces under way, no longer than the deadline, and free everything. Returns the number of pieces that the
 * kernel did not return: their memory must never be used again. */
uint64_t flexkv_io_queue_close(struct flexkv_io_queue *queue);

#endif
