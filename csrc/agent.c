#include "agent.h"

#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH_BYTES (1u << 20)    /* copied between two looks at cancels and at the socket */
#define FULL_RING_WAIT_MS 1       /* the controller reads its ring without being asked; it is only late */

struct op {
    struct op *next;
    struct flexkv_msg_op msg;
    uint32_t done;                /* blocks that have a result */
    int cancelled;
    int32_t *slots;
    int32_t *pages;
    uint8_t *ok;
};

struct flexkv_agent {
    struct flexkv_agent_options options;
    struct flexkv_ring submissions;
    struct flexkv_ring completions;
    _Atomic uint64_t load_fence;
    _Atomic uint64_t save_fence;
    _Atomic int status;
    _Atomic int stop;
    int wake_fd;
    pthread_t thread;
    struct op *ops;               /* given and not finished, oldest first; of the thread alone */
    uint8_t *buffer;              /* for a record */
    uint64_t buffer_size;
    pthread_mutex_t lock;         /* for what follows */
    pthread_cond_t changed;
    struct flexkv_outcome *first;
    struct flexkv_outcome **last;
};

static void copy_with_cpu(void *context, const struct flexkv_pages *at, enum flexkv_kind kind, const int32_t *slots,
                          const int32_t *pages, uint32_t count, uint8_t *ok)
{
    (void)context;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *segment = at->pool + (uint64_t)slots[i] * at->slot_bytes + at->segment_offset;

        for (uint32_t r = 0; r < at->num_regions; r++) {
            const struct flexkv_region *region = &at->regions[r];
            uint8_t *page = (uint8_t *)(region->base + (uint64_t)(pages[i] * region->page_stride));

            if (kind == FLEXKV_D2H)
                memcpy(segment + region->slot_offset, page, region->chunk_bytes);
            else
                memcpy(page, segment + region->slot_offset, region->chunk_bytes);
        }
        ok[i] = 1;
    }
}

const struct flexkv_backend flexkv_host_backend = { copy_with_cpu, NULL };

static int in_range(const struct flexkv_pages *at, int32_t slot, int32_t page)
{
    return slot >= 0 && (uint64_t)slot < at->num_slots && page >= 0 && (uint64_t)page < at->num_pages;
}

/* Copy blocks [op->done, until); a block that is out of range is not ok. */
static void copy_blocks(struct flexkv_agent *agent, struct op *op, uint32_t until)
{
    const struct flexkv_pages *at = &agent->options.at;
    uint32_t i = op->done, run;

    while (i < until) {
        for (run = i; run < until && in_range(at, op->slots[run], op->pages[run]); run++)
            ;
        if (run > i)
            agent->options.backend.copy(agent->options.backend.context, at, op->msg.kind, op->slots + i,
                                        op->pages + i, run - i, op->ok + i);
        i = run + (run < until);
    }
}

/* Keep the op's outcome for the process itself. */
static void keep_outcome(struct flexkv_agent *agent, const struct op *op)
{
    uint32_t count = op->msg.count;
    struct flexkv_outcome *outcome = malloc(sizeof(*outcome) + count * (sizeof(int32_t) + 1));
    int32_t *pages;
    uint8_t *ok;

    if (!outcome)
        return;                   /* a few bytes: the process is lost anyway */
    pages = (int32_t *)(outcome + 1);
    ok = (uint8_t *)(pages + count);
    memcpy(pages, op->pages, count * sizeof(int32_t));
    memcpy(ok, op->ok, count);
    *outcome = (struct flexkv_outcome){ NULL, op->msg.task_id, op->msg.kind, count, op->msg.op_blocks, pages, ok };
    pthread_mutex_lock(&agent->lock);
    *agent->last = outcome;
    agent->last = &outcome->next;
    pthread_cond_broadcast(&agent->changed);
    pthread_mutex_unlock(&agent->lock);
}

static int hung_up(struct flexkv_agent *agent)
{
    struct pollfd fd = { agent->options.socket_fd, POLLIN | POLLRDHUP, 0 };

    if (atomic_load(&agent->stop))
        return -ECANCELED;
    /* the controller says nothing more after the handshake: anything readable is the end */
    return poll(&fd, 1, 0) > 0 ? -EPIPE : 0;
}

/* Tell the controller of blocks [first, op->done). */
static int report(struct flexkv_agent *agent, const struct op *op, uint32_t first, int last)
{
    struct flexkv_msg_result result = { op->msg.op_id, first, op->done - first, (uint32_t)last, 0 };
    struct flexkv_part parts[] = { { &result, sizeof(result) }, { op->ok + first, result.count } };
    struct timespec pause = { 0, FULL_RING_WAIT_MS * 1000000L };
    int rc;

    while ((rc = flexkv_ring_push(&agent->completions, FLEXKV_MSG_RESULT, parts, 2)) == -ENOSPC) {
        if ((rc = hung_up(agent)))
            return rc;
        nanosleep(&pause, NULL);
    }
    return rc;
}

static void unlink_op(struct flexkv_agent *agent, struct op *op)
{
    struct op **at = &agent->ops;

    while (*at != op)
        at = &(*at)->next;
    *at = op->next;
}

static int finish(struct flexkv_agent *agent, struct op *op, uint32_t first)
{
    int rc;

    op->done = op->msg.count;
    unlink_op(agent, op);
    keep_outcome(agent, op);      /* before the controller knows: who asks after its answer finds it */
    rc = report(agent, op, first, 1);
    free(op);
    return rc;
}

static int accept_op(struct flexkv_agent *agent, uint64_t size)
{
    struct flexkv_msg_op msg;
    struct op *op, **at;

    if (size < sizeof(msg))
        return -EBADMSG;
    memcpy(&msg, agent->buffer, sizeof(msg));
    if (size != sizeof(msg) + 2ull * msg.count * sizeof(int32_t) || !msg.count ||
        (msg.kind != FLEXKV_D2H && msg.kind != FLEXKV_H2D))
        return -EBADMSG;
    op = calloc(1, sizeof(*op) + msg.count * (2 * sizeof(int32_t) + 1));
    if (!op)
        return -ENOMEM;
    op->msg = msg;
    op->cancelled = msg.cancelled != 0;
    op->slots = (int32_t *)(op + 1);
    op->pages = op->slots + msg.count;
    op->ok = (uint8_t *)(op->pages + msg.count);
    memcpy(op->slots, agent->buffer + sizeof(msg), 2ull * msg.count * sizeof(int32_t));
    for (at = &agent->ops; *at; at = &(*at)->next)
        ;
    *at = op;
    return 0;
}

static int accept_cancel(struct flexkv_agent *agent, uint64_t size)
{
    struct flexkv_msg_cancel msg;

    if (size != sizeof(msg))
        return -EBADMSG;
    memcpy(&msg, agent->buffer, sizeof(msg));
    for (struct op *op = agent->ops; op; op = op->next)
        if (op->msg.op_id == msg.op_id)
            op->cancelled = 1;
    return 0;                     /* not found: it is finished, and its result on the way */
}

static int drain_submissions(struct flexkv_agent *agent)
{
    uint32_t type;
    int64_t size;
    int rc = 0;

    while (!rc) {
        size = flexkv_ring_pop(&agent->submissions, &type, agent->buffer, agent->buffer_size);
        if (size == -EAGAIN)
            return 0;
        if (size < 0)
            return (int)size;
        if (type == FLEXKV_MSG_OP)
            rc = accept_op(agent, (uint64_t)size);
        else if (type == FLEXKV_MSG_CANCEL)
            rc = accept_cancel(agent, (uint64_t)size);
        else
            rc = -EBADMSG;
    }
    return rc;
}

/* The op to work on now: one to be cancelled, else the oldest load, else the oldest save, of those that may start. */
static struct op *next_op(struct flexkv_agent *agent)
{
    uint64_t load_fence = atomic_load(&agent->load_fence), save_fence = atomic_load(&agent->save_fence);
    struct op *load = NULL, *save = NULL;

    for (struct op *op = agent->ops; op; op = op->next) {
        if (op->cancelled)
            return op;
        if (op->msg.kind == FLEXKV_H2D && !load && op->msg.fence <= load_fence)
            load = op;
        else if (op->msg.kind == FLEXKV_D2H && !save && op->msg.fence <= save_fence)
            save = op;
    }
    return load ? load : save;
}

static int work_on(struct flexkv_agent *agent, struct op *op)
{
    uint32_t first = op->done, batch = BATCH_BYTES / agent->options.at.slot_bytes + 1;
    uint32_t until = op->msg.count - first > batch ? first + batch : op->msg.count;

    if (op->cancelled)
        return finish(agent, op, first);
    copy_blocks(agent, op, until);
    if (until == op->msg.count)
        return finish(agent, op, first);
    op->done = until;
    return report(agent, op, first, 0);
}

static int sleep_until_news(struct flexkv_agent *agent)
{
    struct pollfd fds[] = { { agent->options.submission_event_fd, POLLIN, 0 }, { agent->wake_fd, POLLIN, 0 },
                            { agent->options.socket_fd, POLLIN | POLLRDHUP, 0 } };
    eventfd_t count;

    if (flexkv_ring_set_waiting(&agent->submissions, 1))
        return 0;
    if (poll(fds, 3, -1) < 0 && errno != EINTR)
        return -errno;
    if (fds[0].revents)
        eventfd_read(agent->options.submission_event_fd, &count);
    if (fds[1].revents)
        eventfd_read(agent->wake_fd, &count);
    return 0;
}

static void *run(void *argument)
{
    struct flexkv_agent *agent = argument;
    struct op *op;
    int rc = 0;

    while (!rc) {
        if ((rc = hung_up(agent)) || (rc = drain_submissions(agent)))
            break;
        op = next_op(agent);
        rc = op ? work_on(agent, op) : sleep_until_news(agent);
    }
    /* what was given and not finished has failed, and its owner must learn of it */
    while ((op = agent->ops)) {
        memset(op->ok, 0, op->msg.count);
        agent->ops = op->next;
        keep_outcome(agent, op);
        free(op);
    }
    /* from here on nothing touches a slot or a page: this is what the controller waits for */
    shutdown(agent->options.socket_fd, SHUT_RDWR);
    pthread_mutex_lock(&agent->lock);
    atomic_store(&agent->status, rc);
    pthread_cond_broadcast(&agent->changed);
    pthread_mutex_unlock(&agent->lock);
    return NULL;
}

static void free_agent(struct flexkv_agent *agent)
{
    struct flexkv_outcome *outcome;

    while ((outcome = agent->first)) {
        agent->first = outcome->next;
        free(outcome);
    }
    if (agent->wake_fd >= 0)
        close(agent->wake_fd);
    pthread_cond_destroy(&agent->changed);
    pthread_mutex_destroy(&agent->lock);
    free(agent->buffer);
    free(agent);
}

int flexkv_agent_start(struct flexkv_agent **result, const struct flexkv_agent_options *options)
{
    struct flexkv_agent *agent = calloc(1, sizeof(*agent));
    pthread_condattr_t monotonic;
    int rc;

    if (!agent)
        return -ENOMEM;
    agent->options = *options;
    agent->last = &agent->first;
    pthread_mutex_init(&agent->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&agent->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    agent->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    agent->buffer_size = options->ring_bytes;
    agent->buffer = malloc(agent->buffer_size);
    rc = agent->wake_fd < 0 ? -errno : agent->buffer ? 0 : -ENOMEM;
    if (!rc)
        rc = flexkv_ring_attach(&agent->submissions, options->submissions, options->ring_bytes,
                                options->submission_event_fd);
    if (!rc)
        rc = flexkv_ring_attach(&agent->completions, options->completions, options->ring_bytes,
                                options->completion_event_fd);
    if (!rc)
        rc = -pthread_create(&agent->thread, NULL, run, agent);
    if (rc)
        free_agent(agent);
    else
        *result = agent;
    return rc;
}

static void raise_to(_Atomic uint64_t *fence, uint64_t value)
{
    uint64_t now = atomic_load(fence);

    while (now < value && !atomic_compare_exchange_weak(fence, &now, value))
        ;
}

void flexkv_agent_advance(struct flexkv_agent *agent, uint64_t load_fence, uint64_t save_fence)
{
    raise_to(&agent->load_fence, load_fence);
    raise_to(&agent->save_fence, save_fence);
    eventfd_write(agent->wake_fd, 1);
}

struct flexkv_outcome *flexkv_agent_take(struct flexkv_agent *agent)
{
    struct flexkv_outcome *outcome;

    pthread_mutex_lock(&agent->lock);
    outcome = agent->first;
    if (outcome) {
        agent->first = outcome->next;
        if (!agent->first)
            agent->last = &agent->first;
    }
    pthread_mutex_unlock(&agent->lock);
    return outcome;
}

int flexkv_agent_wait(struct flexkv_agent *agent, int timeout_ms)
{
    struct timespec until;
    int rc = 0, ready;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (timeout_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    pthread_mutex_lock(&agent->lock);
    while (!agent->first && !atomic_load(&agent->status) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&agent->changed, &agent->lock, &until);
    ready = agent->first || atomic_load(&agent->status);
    pthread_mutex_unlock(&agent->lock);
    return ready;
}

int flexkv_agent_status(struct flexkv_agent *agent)
{
    return atomic_load(&agent->status);
}

void flexkv_agent_stop(struct flexkv_agent *agent)
{
    atomic_store(&agent->stop, 1);
    eventfd_write(agent->wake_fd, 1);
    pthread_join(agent->thread, NULL);
    free_agent(agent);
}
