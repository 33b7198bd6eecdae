#include "io_queue.h"

#include "clock.h"
#include "io_job.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define MAX_PIECE_BYTES (1u << 30)    /* the kernel moves less than 2 GiB in one I/O */
#define HASHED_BYTES (256u << 10) /* checksummed between two polls of the method: 20 us */
#define AHEAD 8u                  /* maximum number of checksummed writes of a file that wait to start */
#define AGAIN_NS 1000000          /* delay before an I/O that the kernel refused with EAGAIN or EINTR is retried */
#define ALIGNMENT 4096u           /* of O_DIRECT: a short I/O continues from a multiple of it */

struct file {
    struct pieces waiting[2];     /* of each kind */
    struct jobs hashed;           /* writes that can start */
    uint32_t num_ahead;           /* writes that have been formed and not started */
    uint32_t under_way[2];        /* jobs that the method has, except stuck ones */
    uint32_t num_stuck;
};

struct result {
    uint64_t tag;
    uint64_t checksum;
    int64_t result;
};

struct flexkv_io_queue {
    struct flexkv_io_options options;
    const struct flexkv_io_method *method;
    void *context;                /* of the method */
    pthread_t thread;
    int event_fd;

    /* of the thread alone */
    struct jobs under_way;        /* the method has them */
    struct jobs again;            /* the method could not take them; they count as under way */
    struct jobs stuck;            /* the method has them; their pieces were reported as timed out */
    struct jobs to_hash[2];       /* of each kind: reads that have ended, writes that have not begun */
    uint64_t num_under_way;
    uint64_t deadline_ns;         /* no job under way has an earlier one; 0: none is */
    uint64_t again_ns;            /* when to try again */
    uint64_t close_ns;            /* when to stop waiting for stuck jobs; 0: not closing */
    uint64_t refused_bytes;       /* registering memory up to here has failed */

    pthread_mutex_t lock;         /* for the fields below */
    pthread_cond_t opened;
    int state;                    /* 1: not open yet, 0: open, or negative errno */
    int asleep;
    int closing;
    struct pieces submitted;
    uint64_t registrable_bytes;
    uint64_t *cancelled;          /* tags */
    uint64_t num_cancelled;
    uint64_t registered_bytes;
    int register_error;
    struct result *results;
    uint64_t num_results, max_results;
    uint64_t num_unfinished;      /* pieces that were submitted and have no result: there is room for these */
    uint64_t num_busy;            /* pieces of stuck jobs */
    struct file files[];
};

/* The piece has a result. */
static void report(struct flexkv_io_queue *queue, const struct piece *piece, int64_t result)
{
    pthread_mutex_lock(&queue->lock);
    queue->results[queue->num_results++] = (struct result){ piece->tag, piece->checksum, result };
    queue->num_unfinished--;
    if (queue->num_results == 1)
        eventfd_write(queue->event_fd, 1);
    pthread_mutex_unlock(&queue->lock);
}

static void tell_all(struct flexkv_io_queue *queue, struct pieces *pieces, int64_t result)
{
    struct piece *piece;

    while ((piece = pop_piece(pieces))) {
        report(queue, piece, result);
        free(piece);
    }
}

static uint64_t hash(const struct flexkv_io_queue *queue, const struct piece *piece)
{
    return XXH3_64bits(queue->options.memory + piece->memory_offset, piece->size);
}

/* Report the results of a job that the method has returned or refused. If a merged I/O of several pieces failed, each
 * piece is tried alone. */
static void conclude(struct flexkv_io_queue *queue, struct job *job)
{
    struct pieces *waiting = &queue->files[job->io.file].waiting[job->io.kind], retried;
    int retry = job->num_pieces > 1 && job->error != -ETIMEDOUT && job->error != -ECANCELED;
    struct piece *piece;

    clear_pieces(&retried);
    while ((piece = pop_piece(&job->pieces))) {
        int covered = piece->file_offset + piece->size - job->offset <= job->covered;

        if (!covered && retry) {
            piece->alone = 1;
            append_piece(&retried, piece);
            continue;
        }
        if (covered && job->io.kind == FLEXKV_IO_READ)
            piece->checksum = hash(queue, piece);
        report(queue, piece, covered ? 0 : job->error);
        free(piece);
    }
    if (retried.first) {
        if (!(*retried.last = waiting->first))
            waiting->last = retried.last;
        waiting->first = retried.first;
    }
    free(job);
}

/* The method is done with the job. `error` is the negative errno of the bytes that are not covered, or 0. */
static void finish(struct flexkv_io_queue *queue, struct job *job, int64_t error)
{
    job->error = error;
    queue->files[job->io.file].under_way[job->io.kind]--;
    queue->num_under_way--;
    if (job->io.kind == FLEXKV_IO_READ)
        append_job(&queue->to_hash[FLEXKV_IO_READ], job);
    else
        conclude(queue, job);
}

static void try_again(struct flexkv_io_queue *queue, struct job *job, uint64_t now)
{
    append_job(&queue->again, job);
    queue->again_ns = now + AGAIN_NS;
}

/* Start a job that counts as under way. */
static void start(struct flexkv_io_queue *queue, struct job *job, uint64_t now)
{
    int rc;

    if (!job->deadline_ns)
        job->deadline_ns = now + queue->options.deadline_ns;
    if (!queue->deadline_ns || job->deadline_ns < queue->deadline_ns)
        queue->deadline_ns = job->deadline_ns;
    rc = queue->method->start(queue->context, &job->io);
    if (!rc)
        append_job(&queue->under_way, job);
    else if (rc == -EAGAIN)
        try_again(queue, job, now);
    else
        finish(queue, job, rc);
}

static void retry(struct flexkv_io_queue *queue, uint64_t now)
{
    struct job *job = queue->again.first, *next;

    clear_jobs(&queue->again);
    for (; job; job = next) {
        next = job->next;
        start(queue, job, now);
    }
}

/* The method has returned a job. */
static void take_back(struct flexkv_io_queue *queue, struct job *job, uint64_t now)
{
    int64_t result = job->io.result;
    uint64_t bytes = flexkv_io_bytes(&job->io), reached, next;

    remove_job(&queue->under_way, job);
    if (result == -EAGAIN || result == -EINTR) {
        if (queue->close_ns)
            finish(queue, job, -ECANCELED);
        else
            try_again(queue, job, now);
        return;
    }
    if (result <= 0) {            /* 0: the file ends there or, after a short read, within the sector there */
        int ends = !result || (result == -EINVAL && job->covered);

        finish(queue, job, ends ? -EIO : result);
        return;
    }
    reached = job->io.offset + (uint64_t)result;
    if (reached - job->offset > job->covered)
        job->covered = reached - job->offset;
    if ((uint64_t)result >= bytes) {
        finish(queue, job, 0);
        return;
    }
    next = reached & ~(uint64_t)(ALIGNMENT - 1);
    flexkv_io_advance(job, next > job->io.offset ? next : reached);
    start(queue, job, now);
}

/* The kernel has returned a job that had timed out. */
static void release(struct flexkv_io_queue *queue, struct job *job)
{
    struct piece *piece;

    pthread_mutex_lock(&queue->lock);
    remove_job(&queue->stuck, job);
    queue->num_busy -= job->num_pieces;
    eventfd_write(queue->event_fd, 1);
    pthread_mutex_unlock(&queue->lock);
    queue->files[job->io.file].num_stuck--;
    while ((piece = pop_piece(&job->pieces)))
        free(piece);
    free(job);
}

/* A job has missed its deadline while the method has it. */
static void give_up(struct flexkv_io_queue *queue, struct job *job)
{
    struct file *file = &queue->files[job->io.file];

    file->under_way[job->io.kind]--;
    file->num_stuck++;
    queue->num_under_way--;
    job->is_stuck = 1;
    pthread_mutex_lock(&queue->lock);
    append_job(&queue->stuck, job);
    queue->num_busy += job->num_pieces;
    pthread_mutex_unlock(&queue->lock);
    for (struct piece *piece = job->pieces.first; piece; piece = piece->next)
        report(queue, piece, -ETIMEDOUT);
    if (queue->method->cancel)
        queue->method->cancel(queue->context, &job->io);
}

static void expire(struct flexkv_io_queue *queue, uint64_t now)
{
    struct jobs *lists[] = { &queue->under_way, &queue->again };
    struct job *job, *next;

    queue->deadline_ns = 0;
    for (int i = 0; i < 2; i++)
        for (job = lists[i]->first; job; job = next) {
            next = job->next;
            if (job->deadline_ns > now) {
                if (!queue->deadline_ns || job->deadline_ns < queue->deadline_ns)
                    queue->deadline_ns = job->deadline_ns;
                continue;
            }
            remove_job(lists[i], job);
            if (i)
                finish(queue, job, -ETIMEDOUT);
            else
                give_up(queue, job);
        }
}

/* End the jobs that wait for a file with an error. */
static void refuse(struct flexkv_io_queue *queue, struct file *file, int64_t error)
{
    struct job *job;

    while ((job = pop_job(&file->hashed))) {
        file->num_ahead--;
        job->error = error;
        conclude(queue, job);
    }
    tell_all(queue, &file->waiting[FLEXKV_IO_READ], error);
    tell_all(queue, &file->waiting[FLEXKV_IO_WRITE], error);
}

/* A job of the pieces that wait first, or NULL if none waits. */
static struct job *form(struct flexkv_io_queue *queue, struct pieces *waiting)
{
    struct job *job = NULL;

    while (waiting->first && !(job = flexkv_io_form(waiting, queue->options.memory))) {
        struct piece *piece = pop_piece(waiting);

        report(queue, piece, -ENOMEM);
        free(piece);
    }
    return job;
}

/* The next job of a file. Reads go first; while some wait, writes have a quarter of the depth. */
static struct job *next_job(struct flexkv_io_queue *queue, struct file *file)
{
    uint32_t reads = file->under_way[FLEXKV_IO_READ], writes = file->under_way[FLEXKV_IO_WRITE];
    int read_waits = file->waiting[FLEXKV_IO_READ].first != NULL;

    if (reads + writes >= queue->options.depth)
        return NULL;
    if (file->hashed.first && (!read_waits || writes < queue->options.depth / 4)) {
        file->num_ahead--;
        return pop_job(&file->hashed);
    }
    return form(queue, &file->waiting[FLEXKV_IO_READ]);
}

static void start_some(struct flexkv_io_queue *queue, struct file *file, uint64_t now)
{
    struct job *job;

    if (file->num_stuck || queue->close_ns) {
        refuse(queue, file, queue->close_ns ? -ECANCELED : -ETIMEDOUT);
        return;
    }
    while ((job = next_job(queue, file))) {
        file->under_way[job->io.kind]++;
        queue->num_under_way++;
        start(queue, job, now);
    }
    while (file->num_ahead < AHEAD && (job = form(queue, &file->waiting[FLEXKV_IO_WRITE]))) {
        file->num_ahead++;
        append_job(&queue->to_hash[FLEXKV_IO_WRITE], job);
    }
}

static int must_hash(const struct flexkv_io_queue *queue)
{
    return queue->to_hash[FLEXKV_IO_READ].first || queue->to_hash[FLEXKV_IO_WRITE].first;
}

/* Compute the checksums of some jobs, reads first, because a load waits for them. Several small jobs at a time, so that
 * the I/Os that can start after that are submitted together. */
static void hash_some(struct flexkv_io_queue *queue)
{
    uint64_t bytes = 0;
    struct job *job;

    while (bytes < HASHED_BYTES && (job = pop_job(&queue->to_hash[FLEXKV_IO_READ]))) {
        bytes += job->covered;
        conclude(queue, job);
    }
    while (bytes < HASHED_BYTES && (job = pop_job(&queue->to_hash[FLEXKV_IO_WRITE]))) {
        for (struct piece *piece = job->pieces.first; piece; piece = piece->next) {
            piece->checksum = hash(queue, piece);
            bytes += piece->size;
        }
        append_job(&queue->files[job->io.file].hashed, job);
    }
}

static int compare_tags(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static void cancel_waiting(struct flexkv_io_queue *queue, struct pieces *waiting, const uint64_t *tags, uint64_t count)
{
    struct pieces kept;
    struct piece *piece;

    clear_pieces(&kept);
    while ((piece = pop_piece(waiting))) {
        if (bsearch(&piece->tag, tags, count, sizeof(*tags), compare_tags)) {
            report(queue, piece, -ECANCELED);
            free(piece);
        } else {
            append_piece(&kept, piece);
        }
    }
    if ((waiting->first = kept.first))
        waiting->last = kept.last;
}

/* Take the requests of other threads. */
static void accept_requests(struct flexkv_io_queue *queue, uint64_t now)
{
    struct piece *piece, *next;
    uint64_t *tags, num_tags;

    pthread_mutex_lock(&queue->lock);
    queue->asleep = 0;
    piece = queue->submitted.first;
    clear_pieces(&queue->submitted);
    tags = queue->cancelled;
    num_tags = queue->num_cancelled;
    queue->cancelled = NULL;
    queue->num_cancelled = 0;
    if (queue->closing && !queue->close_ns)
        queue->close_ns = now + queue->options.deadline_ns;
    pthread_mutex_unlock(&queue->lock);
    for (; piece; piece = next) {
        next = piece->next;
        append_piece(&queue->files[piece->file].waiting[piece->kind], piece);
    }
    if (tags) {
        qsort(tags, num_tags, sizeof(*tags), compare_tags);
        for (uint32_t i = 0; i < queue->options.num_files; i++)
            for (int kind = FLEXKV_IO_READ; kind <= FLEXKV_IO_WRITE; kind++)
                cancel_waiting(queue, &queue->files[i].waiting[kind], tags, num_tags);
        free(tags);
    }
}

/* Register a part of memory, if there is one to register: 1 if there may be another. */
static int grow(struct flexkv_io_queue *queue)
{
    uint64_t upto, registered;
    int64_t result;

    pthread_mutex_lock(&queue->lock);
    upto = queue->registrable_bytes;
    registered = queue->registered_bytes;
    pthread_mutex_unlock(&queue->lock);
    if (!queue->method->grow || upto <= registered || upto <= queue->refused_bytes)
        return 0;
    result = queue->method->grow(queue->context, upto);
    if (result < 0)
        queue->refused_bytes = UINT64_MAX;
    else if ((uint64_t)result == registered)
        queue->refused_bytes = upto;
    pthread_mutex_lock(&queue->lock);
    if (result < 0)
        queue->register_error = (int)result;
    else
        queue->registered_bytes = (uint64_t)result;
    pthread_mutex_unlock(&queue->lock);
    return result > (int64_t)registered;
}

static int is_over(const struct flexkv_io_queue *queue, uint64_t now)
{
    return queue->close_ns && !queue->num_under_way && !must_hash(queue) &&
           (!queue->stuck.first || now >= queue->close_ns);
}

/* Nanoseconds until the next timed action, if no I/O ends and no thread wakes this one; negative: there is none. */
static int64_t sleep_ns(struct flexkv_io_queue *queue, uint64_t now)
{
    uint64_t until = queue->deadline_ns;
    int busy;

    if (queue->again.first && (!until || queue->again_ns < until))
        until = queue->again_ns;
    if (queue->close_ns && (!until || queue->close_ns < until))
        until = queue->close_ns;
    pthread_mutex_lock(&queue->lock);
    busy = queue->submitted.first || queue->cancelled || (queue->closing && !queue->close_ns) ||
           (queue->method->grow && queue->registrable_bytes > queue->registered_bytes &&
            queue->registrable_bytes > queue->refused_bytes);
    queue->asleep = !busy;
    pthread_mutex_unlock(&queue->lock);
    if (busy || is_over(queue, now))
        return 0;
    return !until ? -1 : until > now ? (int64_t)(until - now) : 0;
}

static void work(struct flexkv_io_queue *queue)
{
    uint64_t now = now_ns();
    struct flexkv_io *io;
    struct job *job;

    for (; !is_over(queue, now); now = now_ns()) {
        int hashing;

        accept_requests(queue, now);
        while ((io = queue->method->ended(queue->context))) {
            job = (struct job *)io;
            if (job->is_stuck)
                release(queue, job);
            else
                take_back(queue, job, now);
        }
        if (queue->deadline_ns && now >= queue->deadline_ns)
            expire(queue, now);
        if (queue->again.first && now >= queue->again_ns)
            retry(queue, now);
        for (uint32_t i = 0; i < queue->options.num_files; i++)
            start_some(queue, &queue->files[i], now);
        hashing = must_hash(queue) || grow(queue);
        queue->method->wait(queue->context, hashing ? 0 : sleep_ns(queue, now));
        hash_some(queue);
    }
}

static void *run(void *argument)
{
    struct flexkv_io_queue *queue = argument;
    int rc = queue->method->open(&queue->context, &queue->options);

    pthread_mutex_lock(&queue->lock);
    queue->state = rc;
    pthread_cond_signal(&queue->opened);
    pthread_mutex_unlock(&queue->lock);
    if (rc)
        return NULL;
    work(queue);
    accept_requests(queue, now_ns());
    for (uint32_t i = 0; i < queue->options.num_files; i++)
        refuse(queue, &queue->files[i], -ECANCELED);
    queue->method->close(queue->context, queue->num_busy);
    return NULL;
}

static void free_queue(struct flexkv_io_queue *queue)
{
    if (queue->event_fd >= 0)
        close(queue->event_fd);
    pthread_cond_destroy(&queue->opened);
    pthread_mutex_destroy(&queue->lock);
    free(queue->cancelled);
    free(queue->results);
    free(queue);
}

static int start_thread(struct flexkv_io_queue *queue)
{
    sigset_t all, before;
    int rc;

    sigfillset(&all);             /* signals are handled by the other threads of the process */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = -pthread_create(&queue->thread, NULL, run, queue);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return rc;
    pthread_mutex_lock(&queue->lock);
    while (queue->state == 1)
        pthread_cond_wait(&queue->opened, &queue->lock);
    rc = queue->state;
    pthread_mutex_unlock(&queue->lock);
    if (rc)
        pthread_join(queue->thread, NULL);
    return rc;
}

int flexkv_io_queue_open(struct flexkv_io_queue **result, const struct flexkv_io_options *options)
{
    struct flexkv_io_queue *queue;
    int rc;

    if (!options->num_files || !options->depth || !options->deadline_ns)
        return -EINVAL;
    queue = calloc(1, sizeof(*queue) + options->num_files * sizeof(struct file));
    if (!queue)
        return -ENOMEM;
    queue->options = *options;
    queue->method = options->method;
    queue->state = 1;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->opened, NULL);
    clear_pieces(&queue->submitted);
    clear_jobs(&queue->under_way);
    clear_jobs(&queue->again);
    clear_jobs(&queue->stuck);
    for (int kind = FLEXKV_IO_READ; kind <= FLEXKV_IO_WRITE; kind++)
        clear_jobs(&queue->to_hash[kind]);
    for (uint32_t i = 0; i < options->num_files; i++) {
        clear_pieces(&queue->files[i].waiting[FLEXKV_IO_READ]);
        clear_pieces(&queue->files[i].waiting[FLEXKV_IO_WRITE]);
        clear_jobs(&queue->files[i].hashed);
    }
    queue->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    rc = queue->event_fd < 0 ? -errno : start_thread(queue);
    queue->options.files = NULL;  /* the method has its own */
    if (rc)
        free_queue(queue);
    else
        *result = queue;
    return rc;
}

int flexkv_io_queue_event_fd(const struct flexkv_io_queue *queue)
{
    return queue->event_fd;
}

/* Wake the thread, then release the lock. In the other order a thread that closes the queue could free the memory that
 * `wake` uses. */
static void wake_and_unlock(struct flexkv_io_queue *queue)
{
    if (queue->asleep)
        queue->method->wake(queue->context);
    queue->asleep = 0;
    pthread_mutex_unlock(&queue->lock);
}

void flexkv_io_queue_register(struct flexkv_io_queue *queue, uint64_t upto_bytes)
{
    pthread_mutex_lock(&queue->lock);
    if (upto_bytes > queue->options.memory_bytes)
        upto_bytes = queue->options.memory_bytes;
    if (upto_bytes > queue->registrable_bytes)
        queue->registrable_bytes = upto_bytes;
    wake_and_unlock(queue);
}

uint64_t flexkv_io_queue_registered(struct flexkv_io_queue *queue, int *error)
{
    uint64_t bytes;

    pthread_mutex_lock(&queue->lock);
    bytes = queue->registered_bytes;
    *error = queue->register_error;
    pthread_mutex_unlock(&queue->lock);
    return bytes;
}

static int is_valid(const struct flexkv_io_queue *queue, const struct flexkv_io_pieces *pieces, uint64_t i)
{
    uint64_t size = pieces->size, bytes = queue->options.memory_bytes;

    return pieces->files[i] >= 0 && (uint32_t)pieces->files[i] < queue->options.num_files &&
           pieces->file_offsets[i] >= 0 && (uint64_t)pieces->file_offsets[i] <= INT64_MAX - size &&
           pieces->memory_offsets[i] >= 0 && size <= bytes && (uint64_t)pieces->memory_offsets[i] <= bytes - size;
}

/* Reserve room for a result of each piece, so that a report cannot fail. The caller must hold the lock. */
static int reserve(struct flexkv_io_queue *queue, uint64_t count)
{
    uint64_t needed = queue->num_results + queue->num_unfinished + count;
    struct result *larger;

    if (needed <= queue->max_results)
        return 0;
    larger = realloc(queue->results, 2 * needed * sizeof(*larger));
    if (!larger)
        return -ENOMEM;
    queue->results = larger;
    queue->max_results = 2 * needed;
    return 0;
}

int flexkv_io_queue_submit(struct flexkv_io_queue *queue, const struct flexkv_io_pieces *pieces)
{
    struct pieces made;
    struct piece *piece;
    int rc = pieces->size && pieces->size <= MAX_PIECE_BYTES ? 0 : -EINVAL;

    clear_pieces(&made);
    for (uint64_t i = 0; i < pieces->count && !rc; i++) {
        piece = is_valid(queue, pieces, i) ? malloc(sizeof(*piece)) : NULL;
        if (!piece) {
            rc = is_valid(queue, pieces, i) ? -ENOMEM : -EINVAL;
            break;
        }
        *piece = (struct piece){ NULL, pieces->tags[i], (uint64_t)pieces->file_offsets[i],
                                 (uint64_t)pieces->memory_offsets[i], pieces->size, 0,
                                 (uint32_t)pieces->files[i], (uint8_t)pieces->kind, 0 };
        append_piece(&made, piece);
    }
    if (!rc && made.first) {
        pthread_mutex_lock(&queue->lock);
        rc = reserve(queue, pieces->count);
        if (!rc) {
            queue->num_unfinished += pieces->count;
            *queue->submitted.last = made.first;
            queue->submitted.last = made.last;
            clear_pieces(&made);
        }
        wake_and_unlock(queue);
    }
    while ((piece = pop_piece(&made)))
        free(piece);
    return rc;
}

int flexkv_io_queue_cancel(struct flexkv_io_queue *queue, const uint64_t *tags, uint64_t count)
{
    uint64_t *more;

    if (!count)
        return 0;
    pthread_mutex_lock(&queue->lock);
    more = realloc(queue->cancelled, (queue->num_cancelled + count) * sizeof(*more));
    if (more) {
        memcpy(more + queue->num_cancelled, tags, count * sizeof(*more));
        queue->cancelled = more;
        queue->num_cancelled += count;
    }
    wake_and_unlock(queue);
    return more ? 0 : -ENOMEM;
}

uint64_t flexkv_io_queue_ready(struct flexkv_io_queue *queue)
{
    uint64_t count;

    pthread_mutex_lock(&queue->lock);
    count = queue->num_results;
    pthread_mutex_unlock(&queue->lock);
    return count;
}

uint64_t flexkv_io_queue_take(struct flexkv_io_queue *queue, uint64_t max, uint64_t *tags, int32_t *results,
                              uint64_t *checksums)
{
    uint64_t count;
    eventfd_t ignored;

    pthread_mutex_lock(&queue->lock);
    eventfd_read(queue->event_fd, &ignored);
    count = queue->num_results < max ? queue->num_results : max;
    for (uint64_t i = 0; i < count; i++) {
        tags[i] = queue->results[i].tag;
        results[i] = (int32_t)queue->results[i].result;
        checksums[i] = queue->results[i].checksum;
    }
    queue->num_results -= count;
    if (queue->num_results) {
        memmove(queue->results, queue->results + count, queue->num_results * sizeof(*queue->results));
        eventfd_write(queue->event_fd, 1);
    }
    pthread_mutex_unlock(&queue->lock);
    return count;
}

uint64_t flexkv_io_queue_busy(struct flexkv_io_queue *queue, uint64_t max, uint64_t *tags)
{
    uint64_t count = 0;

    pthread_mutex_lock(&queue->lock);
    for (struct job *job = queue->stuck.first; job; job = job->next)
        for (struct piece *piece = job->pieces.first; piece; piece = piece->next, count++)
            if (count < max)
                tags[count] = piece->tag;
    pthread_mutex_unlock(&queue->lock);
    return count;
}

uint64_t flexkv_io_queue_close(struct flexkv_io_queue *queue)
{
    uint64_t lost;

    pthread_mutex_lock(&queue->lock);
    queue->closing = 1;
    wake_and_unlock(queue);
    pthread_join(queue->thread, NULL);
    lost = queue->num_busy;       /* their jobs are never freed: the kernel may still write to them */
    free_queue(queue);
    return lost;
}
