/* I/O queue: a thread that moves pieces between memory and files, and reports the XXH3-64 of each.
 *
 * A piece is a range of bytes, contiguous in a file and in memory. Neighbouring pieces of a file are merged into one
 * I/O. Every submitted piece gets exactly one result, also after a failure. Pieces may be moved in any order. */
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

/* The caller owns memory and descriptors; they must outlive flexkv_io_queue_close. Returns 0, or a negative
 * errno: that of the method, of an eventfd or of a thread that cannot be made, or -ENOMEM. */
int flexkv_io_queue_open(struct flexkv_io_queue **result, const struct flexkv_io_options *options);

/* Readable when there are results to take, and after the number of busy pieces has decreased. */
int flexkv_io_queue_event_fd(const struct flexkv_io_queue *queue);

/* Allow the queue to register the first `upto_bytes` bytes of memory with the kernel. */
void flexkv_io_queue_register(struct flexkv_io_queue *queue, uint64_t upto_bytes);

/* Number of bytes registered. *error: 0, or the negative errno after which no more memory is registered. */
uint64_t flexkv_io_queue_registered(struct flexkv_io_queue *queue, int *error);

/* Submit pieces. Returns 0, -EINVAL (a piece is outside of the memory, or its file index is out of range) or -ENOMEM;
 * on an error no piece is submitted. Never waits. */
int flexkv_io_queue_submit(struct flexkv_io_queue *queue, const struct flexkv_io_pieces *pieces);

/* End, with -ECANCELED, the pieces with these tags that have not begun. Returns 0 or -ENOMEM. Never waits. */
int flexkv_io_queue_cancel(struct flexkv_io_queue *queue, const uint64_t *tags, uint64_t count);

/* Number of results to take. */
uint64_t flexkv_io_queue_ready(struct flexkv_io_queue *queue);

/* Take at most `max` results, oldest first; each array must have room for `max`. Returns the number taken. */
uint64_t flexkv_io_queue_take(struct flexkv_io_queue *queue, uint64_t max, uint64_t *tags, int32_t *results,
                              uint64_t *checksums);

/* Returns the number of busy pieces: reported as -ETIMEDOUT, while the kernel may still access their memory. Writes the
 * tags of at most `max` of them. */
uint64_t flexkv_io_queue_busy(struct flexkv_io_queue *queue, uint64_t max, uint64_t *tags);

/* Wait for pieces under way, no longer than the deadline, and free everything. Returns the number of pieces that the
 * kernel did not return: their memory must never be used again. */
uint64_t flexkv_io_queue_close(struct flexkv_io_queue *queue);

#endif
