/* How I/Os get to the kernel and back: io_uring, or threads. The queue has the parts common to both. */
#ifndef FLEXKV_IO_METHOD_H
#define FLEXKV_IO_METHOD_H

#include "io_queue.h"

#include <stddef.h>
#include <sys/uio.h>

struct flexkv_io {                /* bytes that are contiguous in a file */
    struct flexkv_io *next;       /* for the method's lists while it has the I/O, else for the queue's */
    enum flexkv_io_kind kind;
    uint32_t file;                /* index of the descriptor */
    uint64_t offset;
    struct iovec *vectors;
    uint32_t num_vectors;
    int64_t result;               /* of an I/O that has ended: number of bytes moved, or negative errno */
};

/* All calls come from the queue's thread, except wake. */
struct flexkv_io_method {
    /* The first call. `context` is passed to the others. */
    int (*open)(void **context, const struct flexkv_io_options *options);
    /* Begin an I/O. 0: `ended` will return it. Negative errno: it was not begun. */
    int (*start)(void *context, struct flexkv_io *io);
    /* Submit the started I/Os to the kernel, then sleep until an I/O has ended, `wake` was called, or the timeout has
     * passed (negative: without limit; 0: do not sleep). May return early. */
    void (*wait)(void *context, int64_t timeout_ns);
    /* An I/O that has ended, or NULL: then `wait` sleeps until there is one. Nothing accesses its memory any more. */
    struct flexkv_io *(*ended)(void *context);
    /* From any thread, under the queue's lock: must not call the queue. */
    void (*wake)(void *context);
    /* Try to end an I/O early; `ended` returns it in any case. May be NULL. */
    void (*cancel)(void *context, struct flexkv_io *io);
    /* Register the next part of the first `upto` bytes of memory. Returns the number of bytes registered so far, or
     * negative errno. May be NULL. */
    int64_t (*grow)(void *context, uint64_t upto);
    /* Free everything. `lost` I/Os have not ended and may never end; their memory must stay. */
    void (*close)(void *context, uint64_t lost);
};

extern const struct flexkv_io_method flexkv_io_uring;
extern const struct flexkv_io_method flexkv_io_threads;

static inline size_t flexkv_io_bytes(const struct flexkv_io *io)
{
    size_t bytes = 0;

    for (uint32_t i = 0; i < io->num_vectors; i++)
        bytes += io->vectors[i].iov_len;
    return bytes;
}

#endif
