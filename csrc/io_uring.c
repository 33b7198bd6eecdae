#include "io_method.h"

#if defined(__has_include) && !__has_include(<liburing.h>)
#error "liburing and its headers are missing: sudo apt-get install liburing-dev"
#endif
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_ENTRIES 4096u         /* of the submission queue; more I/Os can be under way */
#define CHUNK_BYTES (256ull << 20)    /* registered at a time; while it is, no I/O starts: about 10 ms */
#define MAX_CHUNKS 16384u         /* IORING_MAX_REG_BUFFERS */
#define PAUSE_NS 1000000          /* when the kernel takes nothing now */
#define NEEDED (IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG)  /* Linux 5.11 */

/* User data of completions that are not of an I/O. */
#define WAKE ((void *)1)
#define NOTHING ((void *)2)

struct uring {
    struct io_uring ring;
    int *files;
    int fixed_files;
    int wake_fd;
    int wake_armed;
    uint64_t wake_count;
    uint8_t *memory;
    uint64_t memory_bytes;
    uint64_t chunk_bytes;
    uint64_t registered;          /* bytes, from the first on; all but the last chunk are whole */
};

static int init_ring(struct io_uring *ring, unsigned entries)
{
    /* newest first: completions are handled in batches, when this thread asks for them (6.1); old kernels refuse */
    static const unsigned flags[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        0,
    };
    int rc = -EINVAL;

    for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]) && rc == -EINVAL; i++) {
        struct io_uring_params params = { .flags = flags[i] | IORING_SETUP_CLAMP };

        rc = io_uring_queue_init_params(entries, ring, &params);
        if (!rc && (params.features & NEEDED) != NEEDED) {
            io_uring_queue_exit(ring);
            rc = -ENOSYS;
        }
    }
    return rc;
}

static void close_uring(void *context, uint64_t lost)
{
    struct uring *uring = context;

    (void)lost;                   /* the kernel keeps the memory that it needs */
    io_uring_queue_exit(&uring->ring);
    close(uring->wake_fd);
    free(uring->files);
    free(uring);
}

static int open_uring(void **context, const struct flexkv_io_options *options)
{
    uint64_t entries = (uint64_t)options->depth * options->num_files + 1, chunks;
    struct uring *uring = calloc(1, sizeof(*uring));
    int rc;

    if (!uring)
        return -ENOMEM;
    uring->wake_fd = eventfd(0, EFD_CLOEXEC);
    rc = uring->wake_fd < 0 ? -errno : init_ring(&uring->ring, entries < MAX_ENTRIES ? entries : MAX_ENTRIES);
    if (rc) {
        if (uring->wake_fd >= 0)
            close(uring->wake_fd);
        free(uring);
        return rc;
    }
    io_uring_register_ring_fd(&uring->ring);    /* only saves time; so does the next */
    uring->fixed_files = !io_uring_register_files(&uring->ring, options->files, options->num_files);
    uring->files = malloc(options->num_files * sizeof(int));
    if (!uring->files) {
        close_uring(uring, 0);
        return -ENOMEM;
    }
    memcpy(uring->files, options->files, options->num_files * sizeof(int));
    uring->memory = options->memory;
    uring->memory_bytes = options->memory_bytes;
    uring->chunk_bytes = CHUNK_BYTES;
    while ((chunks = (uring->memory_bytes + uring->chunk_bytes - 1) / uring->chunk_bytes) > MAX_CHUNKS)
        uring->chunk_bytes *= 2;
    *context = uring;
    return 0;
}

static struct io_uring_sqe *next_sqe(struct uring *uring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);

    if (!sqe) {                   /* full: the kernel takes some */
        io_uring_submit(&uring->ring);
        sqe = io_uring_get_sqe(&uring->ring);
    }
    return sqe;
}

/* The registered buffer that holds all of it, or -1. */
static int buffer_of(const struct uring *uring, const struct iovec *vector)
{
    uint64_t first = (uint64_t)((uint8_t *)vector->iov_base - uring->memory), end = first + vector->iov_len;
    uint64_t chunk = first / uring->chunk_bytes;

    return end <= uring->registered && (end - 1) / uring->chunk_bytes == chunk ? (int)chunk : -1;
}

static int start(void *context, struct flexkv_io *io)
{
    struct uring *uring = context;
    int fd = uring->fixed_files ? (int)io->file : uring->files[io->file];
    int buffer = io->num_vectors == 1 ? buffer_of(uring, io->vectors) : -1;
    struct io_uring_sqe *sqe = next_sqe(uring);

    if (!sqe)
        return -EAGAIN;
    if (buffer >= 0)
        io_uring_prep_rw(io->kind == FLEXKV_IO_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED, sqe, fd,
                         io->vectors->iov_base, (unsigned)io->vectors->iov_len, io->offset);
    else
        io_uring_prep_rw(io->kind == FLEXKV_IO_READ ? IORING_OP_READV : IORING_OP_WRITEV, sqe, fd, io->vectors,
                         io->num_vectors, io->offset);
    if (buffer >= 0)
        sqe->buf_index = (uint16_t)buffer;
    if (uring->fixed_files)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, io);
    return 0;
}

static void arm_wake(struct uring *uring)
{
    struct io_uring_sqe *sqe = uring->wake_armed ? NULL : next_sqe(uring);

    if (!sqe)
        return;
    io_uring_prep_read(sqe, uring->wake_fd, &uring->wake_count, sizeof(uring->wake_count), 0);
    io_uring_sqe_set_data(sqe, WAKE);
    uring->wake_armed = 1;
}

static void wait_uring(void *context, int64_t timeout_ns)
{
    struct __kernel_timespec timeout = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
    struct timespec pause = { 0, PAUSE_NS };
    struct uring *uring = context;
    struct io_uring_cqe *cqe;
    int rc = 0;

    arm_wake(uring);
    if (timeout_ns)
        rc = io_uring_submit_and_wait_timeout(&uring->ring, &cqe, 1, timeout_ns < 0 ? NULL : &timeout, NULL);
    else if (io_uring_sq_ready(&uring->ring))
        rc = io_uring_submit_and_get_events(&uring->ring);    /* completions are there after the same system call */
    /* -EBUSY: completions must be taken first; any other refusal would come at once again */
    if (rc < 0 && rc != -ETIME && rc != -EINTR && rc != -EBUSY)
        nanosleep(&pause, NULL);
}

static struct flexkv_io *ended(void *context)
{
    struct uring *uring = context;
    struct io_uring_cqe *cqe;

    while (!io_uring_peek_cqe(&uring->ring, &cqe)) {
        void *data = io_uring_cqe_get_data(cqe);
        int result = cqe->res;

        io_uring_cqe_seen(&uring->ring, cqe);
        if (data == WAKE) {
            uring->wake_armed = 0;
        } else if (data != NOTHING) {
            struct flexkv_io *io = data;

            io->result = result;
            return io;
        }
    }
    return NULL;
}

static void wake(void *context)
{
    struct uring *uring = context;

    eventfd_write(uring->wake_fd, 1);
}

static void cancel(void *context, struct flexkv_io *io)
{
    struct uring *uring = context;
    struct io_uring_sqe *sqe = next_sqe(uring);

    if (!sqe)
        return;
    io_uring_prep_cancel(sqe, io, 0);
    io_uring_sqe_set_data(sqe, NOTHING);
}

static int64_t grow(void *context, uint64_t upto)
{
    struct uring *uring = context;
    uint64_t chunk = uring->registered / uring->chunk_bytes;
    uint64_t first = chunk * uring->chunk_bytes, end = first + uring->chunk_bytes;
    struct iovec vector;
    __u64 tag = 0;
    int rc;

    end = end < uring->memory_bytes ? end : uring->memory_bytes;
    if (end > upto)               /* whole chunks only, so that none is registered twice */
        return (int64_t)uring->registered;
    if (!uring->registered) {
        rc = io_uring_register_buffers_sparse(
            &uring->ring, (unsigned)((uring->memory_bytes + uring->chunk_bytes - 1) / uring->chunk_bytes));
        if (rc < 0)
            return rc;
    }
    vector = (struct iovec){ uring->memory + first, end - first };
    rc = io_uring_register_buffers_update_tag(&uring->ring, (unsigned)chunk, &vector, &tag, 1);
    if (rc < 0)
        return rc;
    uring->registered = end;
    return (int64_t)uring->registered;
}

const struct flexkv_io_method flexkv_io_uring = { open_uring, start, wait_uring, ended,
                                                  wake, cancel, grow, close_uring };
