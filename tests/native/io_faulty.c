#include "io_faulty.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_PLANNED 32

struct planned {
    enum flexkv_io_kind kind;
    int32_t file;
    enum flexkv_io_fault fault;
    int64_t amount;
    uint32_t count;
};

struct flexkv_io_faults {
    struct flexkv_io_method method;       /* the faulty one: its address leads `open_faulty` here */
    const struct flexkv_io_method *inner;
    void *context;                /* of the inner method */
    int *files;
    struct flexkv_io *ended;      /* by a fault */
    struct flexkv_io *hanging[MAX_PLANNED * 8];
    int64_t until_ns[MAX_PLANNED * 8];    /* of those; negative: when released */
    uint32_t num_hanging;
    pthread_mutex_t lock;         /* for what follows */
    int released;
    struct planned planned[MAX_PLANNED];
};

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

void flexkv_io_faults_free(struct flexkv_io_faults *faults)
{
    pthread_mutex_destroy(&faults->lock);
    free(faults->files);
    free(faults);
}

int flexkv_io_faults_plan(struct flexkv_io_faults *faults, enum flexkv_io_kind kind, int32_t file,
                          enum flexkv_io_fault fault, int64_t amount, uint32_t count)
{
    int rc = -ENOSPC;

    pthread_mutex_lock(&faults->lock);
    faults->released = 0;
    for (int i = 0; i < MAX_PLANNED && rc; i++)
        if (!faults->planned[i].count) {
            faults->planned[i] = (struct planned){ kind, file, fault, amount, count };
            rc = 0;
        }
    pthread_mutex_unlock(&faults->lock);
    return rc;
}

void flexkv_io_faults_release(struct flexkv_io_faults *faults)
{
    pthread_mutex_lock(&faults->lock);
    faults->released = 1;
    pthread_mutex_unlock(&faults->lock);
    faults->inner->wake(faults->context);
}

uint32_t flexkv_io_faults_left(struct flexkv_io_faults *faults)
{
    uint32_t left = 0;

    pthread_mutex_lock(&faults->lock);
    for (int i = 0; i < MAX_PLANNED; i++)
        left += faults->planned[i].count;
    pthread_mutex_unlock(&faults->lock);
    return left;
}

/* The fault that an I/O is to have: 1, or 0: none. */
static int take_planned(struct flexkv_io_faults *faults, const struct flexkv_io *io, struct planned *taken)
{
    int found = 0;

    pthread_mutex_lock(&faults->lock);
    for (int i = 0; i < MAX_PLANNED && !found; i++) {
        struct planned *planned = &faults->planned[i];

        if (planned->count && planned->kind == io->kind && (planned->file < 0 || planned->file == (int32_t)io->file)) {
            *taken = *planned;
            planned->count--;
            found = 1;
        }
    }
    pthread_mutex_unlock(&faults->lock);
    return found;
}

static int is_released(struct flexkv_io_faults *faults)
{
    int released;

    pthread_mutex_lock(&faults->lock);
    released = faults->released;
    pthread_mutex_unlock(&faults->lock);
    return released;
}

static int open_faulty(void **context, const struct flexkv_io_options *options)
{
    /* the queue gets a const method, which is part of faults that are not */
    char *method = (char *)options->method;
    struct flexkv_io_faults *faults = (struct flexkv_io_faults *)(method - offsetof(struct flexkv_io_faults, method));
    int rc;

    faults->files = calloc(options->num_files, sizeof(int));
    if (!faults->files)
        return -ENOMEM;
    memcpy(faults->files, options->files, options->num_files * sizeof(int));
    rc = faults->inner->open(&faults->context, options);
    *context = faults;
    return rc;
}

static int64_t move_some(const struct flexkv_io_faults *faults, const struct flexkv_io *io, int64_t bytes)
{
    struct iovec vectors[1024];
    int count = 0, fd = faults->files[io->file];
    ssize_t moved;

    for (; count < (int)io->num_vectors && bytes > 0; count++) {
        vectors[count] = io->vectors[count];
        if ((int64_t)vectors[count].iov_len > bytes)
            vectors[count].iov_len = (size_t)bytes;
        bytes -= (int64_t)vectors[count].iov_len;
    }
    moved = io->kind == FLEXKV_IO_READ ? preadv(fd, vectors, count, (off_t)io->offset)
                                       : pwritev(fd, vectors, count, (off_t)io->offset);
    return moved < 0 ? -errno : moved;
}

static void end(struct flexkv_io_faults *faults, struct flexkv_io *io, int64_t result)
{
    io->result = result;
    io->next = faults->ended;
    faults->ended = io;
}

static int start(void *context, struct flexkv_io *io)
{
    struct flexkv_io_faults *faults = context;
    struct planned planned;

    if (!take_planned(faults, io, &planned))
        return faults->inner->start(faults->context, io);
    if (planned.fault == FLEXKV_IO_FAILS) {
        end(faults, io, planned.amount);
    } else if (planned.fault == FLEXKV_IO_SHORT) {
        end(faults, io, move_some(faults, io, planned.amount));
    } else if (faults->num_hanging == MAX_PLANNED * 8) {
        return -EAGAIN;
    } else {
        faults->until_ns[faults->num_hanging] = planned.amount < 0 ? -1 : now_ns() + planned.amount * 1000000;
        faults->hanging[faults->num_hanging++] = io;
    }
    return 0;
}

/* Start what has hung long enough. Nanoseconds until the next of them, or `timeout_ns` if that is sooner. */
static int64_t release(struct flexkv_io_faults *faults, int64_t timeout_ns)
{
    int released = is_released(faults), rc;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < faults->num_hanging; i++) {
        int64_t until = faults->until_ns[i], left = until - now_ns();

        if (released || (until >= 0 && left <= 0)) {
            rc = faults->inner->start(faults->context, faults->hanging[i]);
            if (rc)
                end(faults, faults->hanging[i], rc);
            continue;
        }
        if (until >= 0 && (timeout_ns < 0 || left < timeout_ns))
            timeout_ns = left;
        faults->hanging[kept] = faults->hanging[i];
        faults->until_ns[kept++] = until;
    }
    faults->num_hanging = kept;
    return timeout_ns;
}

static void wait_faulty(void *context, int64_t timeout_ns)
{
    struct flexkv_io_faults *faults = context;

    timeout_ns = release(faults, timeout_ns);
    faults->inner->wait(faults->context, faults->ended ? 0 : timeout_ns);
}

static struct flexkv_io *ended(void *context)
{
    struct flexkv_io_faults *faults = context;
    struct flexkv_io *io = faults->ended;

    if (!io)
        return faults->inner->ended(faults->context);
    faults->ended = io->next;
    return io;
}

static void wake(void *context)
{
    struct flexkv_io_faults *faults = context;

    faults->inner->wake(faults->context);
}

static int64_t grow(void *context, uint64_t upto)
{
    struct flexkv_io_faults *faults = context;

    return faults->inner->grow ? faults->inner->grow(faults->context, upto) : -ENOSYS;
}

static void close_faulty(void *context, uint64_t lost)
{
    struct flexkv_io_faults *faults = context;

    faults->inner->close(faults->context, lost);
}

static const struct flexkv_io_method faulty = { open_faulty, start, wait_faulty, ended, wake, NULL, grow, close_faulty };

int flexkv_io_faults_create(struct flexkv_io_faults **result, const struct flexkv_io_method *inner)
{
    struct flexkv_io_faults *faults = calloc(1, sizeof(*faults));

    if (!faults)
        return -ENOMEM;
    faults->method = faulty;
    faults->inner = inner;
    pthread_mutex_init(&faults->lock, NULL);
    *result = faults;
    return 0;
}

const struct flexkv_io_method *flexkv_io_faults_method(const struct flexkv_io_faults *faults)
{
    return &faults->method;
}
