#include "io_method.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define MAX_THREADS 8u            /* of a file: one that hangs in the kernel takes none from another */

struct ios {
    struct flexkv_io *first;
    struct flexkv_io **last;
};

struct crew;

struct lane {                     /* a file */
    struct crew *crew;
    int fd;
    struct ios started;           /* that no thread has taken */
    pthread_cond_t work;
};

struct crew {
    pthread_mutex_t lock;         /* for the fields below, and for the lanes */
    pthread_cond_t news;          /* for the queue's thread */
    int woken;
    int over;
    struct ios done;
    uint32_t num_lanes;
    uint32_t num_threads;
    pthread_t *threads;
    struct lane lanes[];
};

static void append(struct ios *ios, struct flexkv_io *io)
{
    io->next = NULL;
    *ios->last = io;
    ios->last = &io->next;
}

static struct flexkv_io *pop(struct ios *ios)
{
    struct flexkv_io *io = ios->first;

    if (io && !(ios->first = io->next))
        ios->last = &ios->first;
    return io;
}

static void *run(void *argument)
{
    struct lane *lane = argument;
    struct crew *crew = lane->crew;
    struct flexkv_io *io;

    pthread_mutex_lock(&crew->lock);
    while (!crew->over) {
        ssize_t moved;

        io = pop(&lane->started);
        if (!io) {
            pthread_cond_wait(&lane->work, &crew->lock);
            continue;
        }
        pthread_mutex_unlock(&crew->lock);
        if (io->kind == FLEXKV_IO_READ)
            moved = preadv(lane->fd, io->vectors, (int)io->num_vectors, (off_t)io->offset);
        else
            moved = pwritev(lane->fd, io->vectors, (int)io->num_vectors, (off_t)io->offset);
        io->result = moved < 0 ? -errno : moved;
        pthread_mutex_lock(&crew->lock);
        append(&crew->done, io);
        pthread_cond_signal(&crew->news);
    }
    pthread_mutex_unlock(&crew->lock);
    return NULL;
}

static void close_threads(void *context, uint64_t lost)
{
    struct crew *crew = context;

    pthread_mutex_lock(&crew->lock);
    crew->over = 1;
    for (uint32_t i = 0; i < crew->num_lanes; i++)
        pthread_cond_broadcast(&crew->lanes[i].work);
    pthread_mutex_unlock(&crew->lock);
    if (lost) {                   /* a thread is still in the kernel, and may come back to this */
        for (uint32_t i = 0; i < crew->num_threads; i++)
            pthread_detach(crew->threads[i]);
        return;
    }
    for (uint32_t i = 0; i < crew->num_threads; i++)
        pthread_join(crew->threads[i], NULL);
    for (uint32_t i = 0; i < crew->num_lanes; i++)
        pthread_cond_destroy(&crew->lanes[i].work);
    pthread_cond_destroy(&crew->news);
    pthread_mutex_destroy(&crew->lock);
    free(crew->threads);
    free(crew);
}

static int open_threads(void **context, const struct flexkv_io_options *options)
{
    uint32_t each = options->depth < MAX_THREADS ? options->depth : MAX_THREADS;
    struct crew *crew = calloc(1, sizeof(*crew) + options->num_files * sizeof(struct lane));
    pthread_condattr_t monotonic;
    int rc = 0;

    if (!crew || !(crew->threads = calloc((size_t)options->num_files * each, sizeof(pthread_t)))) {
        free(crew);
        return -ENOMEM;
    }
    pthread_mutex_init(&crew->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&crew->news, &monotonic);
    pthread_condattr_destroy(&monotonic);
    crew->done.last = &crew->done.first;
    crew->num_lanes = options->num_files;
    for (uint32_t i = 0; i < crew->num_lanes; i++) {
        struct lane *lane = &crew->lanes[i];

        lane->crew = crew;
        lane->fd = options->files[i];
        lane->started.last = &lane->started.first;
        pthread_cond_init(&lane->work, NULL);
    }
    for (uint32_t i = 0; i < crew->num_lanes * each && !rc; i++) {
        rc = -pthread_create(&crew->threads[i], NULL, run, &crew->lanes[i / each]);
        crew->num_threads += !rc;
    }
    if (rc)
        close_threads(crew, 0);
    else
        *context = crew;
    return rc;
}

static int start(void *context, struct flexkv_io *io)
{
    struct crew *crew = context;
    struct lane *lane = &crew->lanes[io->file];

    pthread_mutex_lock(&crew->lock);
    append(&lane->started, io);
    pthread_cond_signal(&lane->work);
    pthread_mutex_unlock(&crew->lock);
    return 0;
}

static void wait_threads(void *context, int64_t timeout_ns)
{
    struct crew *crew = context;
    struct timespec until = { 0, 0 };

    if (timeout_ns > 0) {
        clock_gettime(CLOCK_MONOTONIC, &until);
        timeout_ns += until.tv_nsec;
        until.tv_sec += timeout_ns / 1000000000;
        until.tv_nsec = timeout_ns % 1000000000;
    }
    pthread_mutex_lock(&crew->lock);
    if (!crew->done.first && !crew->woken && timeout_ns < 0)
        pthread_cond_wait(&crew->news, &crew->lock);
    else if (!crew->done.first && !crew->woken && timeout_ns > 0)
        pthread_cond_timedwait(&crew->news, &crew->lock, &until);
    crew->woken = 0;
    pthread_mutex_unlock(&crew->lock);
}

static struct flexkv_io *ended(void *context)
{
    struct crew *crew = context;
    struct flexkv_io *io;

    pthread_mutex_lock(&crew->lock);
    io = pop(&crew->done);
    pthread_mutex_unlock(&crew->lock);
    return io;
}

static void wake(void *context)
{
    struct crew *crew = context;

    pthread_mutex_lock(&crew->lock);
    crew->woken = 1;
    pthread_cond_signal(&crew->news);
    pthread_mutex_unlock(&crew->lock);
}

/* Only an I/O that no thread has taken can be cancelled. */
static void cancel(void *context, struct flexkv_io *io)
{
    struct crew *crew = context;
    struct ios *started = &crew->lanes[io->file].started;
    struct flexkv_io **at;

    pthread_mutex_lock(&crew->lock);
    for (at = &started->first; *at && *at != io; at = &(*at)->next)
        ;
    if (*at) {
        if (!(*at = io->next))
            started->last = at;
        io->result = -ECANCELED;
        append(&crew->done, io);
    }
    pthread_mutex_unlock(&crew->lock);
}

const struct flexkv_io_method flexkv_io_threads = { open_threads, start, wait_threads, ended,
                                                    wake, cancel, NULL, close_threads };
