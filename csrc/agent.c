#include "agent.h"

#include "clock.h"
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SMALL_BYTES (4u << 20)    /* somebody may wait for an op of this size and do nothing else */
#define SPIN_NS 100000            /* a window of such an op that ends so soon is noticed at once */
#define POLL_NS 20000             /* between two looks at them, later on */
#define BULK_POLL_NS 100000       /* and at windows of larger ops: each look takes a lock that the engine's launches need */
#define FENCE_NS 100000000        /* between two looks at fences of compute that runs: deadlines are seconds */
#define JOIN_MS 2000              /* for the thread to end, beyond the time for its windows */
#define FULL_RING_WAIT_MS 1       /* the controller reads its ring without being asked; it is only late */
#define NO_SLOT -1                /* in place of a slot: the block cannot be moved */

struct op {
    struct op *next;
    struct flexkv_msg_op msg;
    uint32_t started;             /* blocks that the backend was given, or that cannot be moved */
    uint32_t done;                /* blocks that have a result */
    uint32_t span;                /* that `started` and windows to come are of */
    int cancelled;                /* or failed: no more of it starts */
    int failed;                   /* a window was not moved: blocks that end after it fail too */
    int32_t *slots;
    int32_t *pages;               /* [groups][count] */
    uint8_t *ok;
};

struct window {                   /* blocks of an op, up to `until`, under way */
    struct window *next;
    struct op *op;
    uint32_t until;
    uint32_t span;
    int is_empty;                 /* none that the backend must move: it ends when the windows before it have ended */
};

struct flexkv_agent {
    struct flexkv_agent_options options;
    struct flexkv_ring submissions;
    struct flexkv_ring completions;
    _Atomic uint64_t load_fence;
    _Atomic uint64_t save_fence;
    _Atomic int status;
    _Atomic int stop;
    _Atomic int at_rest;          /* nothing of it touches pages or slots any more */
    int wake_fd;
    pthread_t thread;
    struct op *ops;               /* given and not finished, oldest first; of the thread alone */
    struct window *windows[FLEXKV_NUM_KINDS];  /* under way of each kind, oldest first */
    uint64_t last_news_ns;        /* when something started or ended */
    uint64_t reached[FLEXKV_H2D + 1];          /* fences of compute that is done, as reported */
    uint64_t fences_read_ns;
    int fences_behind;            /* compute of a fence is not known to be done */
    int exchange_over;            /* no P2D starts any more */
    _Atomic int peers_released;   /* and none is under way */
    int layers_lost;              /* a load with a counter is incomplete: layers are not signalled any more */
    uint8_t *buffer;              /* for a record */
    uint64_t buffer_size;
    pthread_mutex_t lock;         /* for the fields below */
    pthread_cond_t changed;
    uint64_t layerwise_task;      /* the last that something was started of */
    uint32_t layerwise_spans;     /* spans of it of which everything was, counted from the first */
    struct flexkv_signals signals;
    struct flexkv_outcome *first;
    struct flexkv_outcome **last;
};

/* Whether a block of the op can be moved: its slot and its pages exist, and it has a page in one group or more. */
static int in_range(const struct flexkv_pages *at, const struct op *op, uint32_t block)
{
    int any = 0;

    for (uint32_t group = 0; group < at->num_groups; group++) {
        int32_t page = op->pages[(uint64_t)group * op->msg.count + block];

        if (page < -1 || (page >= 0 && (uint64_t)page >= at->num_pages[group]))
            return 0;
        any |= page >= 0;
    }
    return any && op->slots[block] >= 0 && (uint64_t)op->slots[block] < at->num_slots;
}

/* Keep the op's outcome for the process itself. A load in two steps has one, that of the second step. */
static void keep_outcome(struct flexkv_agent *agent, const struct op *op)
{
    uint32_t count = op->msg.count;
    size_t pages_bytes = (size_t)op->msg.groups * count * sizeof(int32_t);
    struct flexkv_outcome *outcome;
    int32_t *pages;
    uint8_t *ok;

    if (!agent->options.keep_outcomes || op->msg.flags & FLEXKV_OP_SHARE)
        return;
    outcome = malloc(sizeof(*outcome) + pages_bytes + count);
    if (!outcome)
        return;                   /* a few bytes: the process is lost anyway */
    pages = (int32_t *)(outcome + 1);
    ok = (uint8_t *)pages + pages_bytes;
    memcpy(pages, op->pages, pages_bytes);
    memcpy(ok, op->ok, count);
    *outcome = (struct flexkv_outcome){ NULL, op->msg.task_id, op->msg.kind == FLEXKV_D2H ? FLEXKV_D2H : FLEXKV_H2D,
                                        count, op->msg.op_blocks, op->msg.groups, pages, ok };
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

/* Report blocks [first, op->done) to the controller. */
static int report(struct flexkv_agent *agent, const struct op *op, uint32_t first, int last)
{
    struct flexkv_msg_result result = { op->msg.op_id, first, op->done - first, (uint32_t)last, 0 };
    struct flexkv_part parts[] = { { &result, sizeof(result) }, { op->ok + first, result.count } };
    struct timespec pause = { 0, FULL_RING_WAIT_MS * 1000000L };
    int rc;

    while ((rc = flexkv_ring_push(&agent->completions, FLEXKV_MSG_RESULT, parts, 2, 0)) == -ENOSPC) {
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

static const struct flexkv_spans *spans_of(const struct flexkv_agent *agent, const struct op *op)
{
    return op->msg.flags & FLEXKV_OP_LAYERWISE ? &agent->options.at.layers
           : op->msg.flags & FLEXKV_OP_SHARE   ? &agent->options.at.shares
                                               : &agent->options.at.moves[op->msg.kind];
}

static uint32_t last_span(const struct flexkv_agent *agent, const struct op *op)
{
    return spans_of(agent, op)->first + spans_of(agent, op)->count - 1;
}

/* A block of the op will not be moved. */
static void lose_layers(struct flexkv_agent *agent, const struct op *op)
{
    pthread_mutex_lock(&agent->lock);
    agent->layers_lost |= op->msg.counter > 0;
    pthread_mutex_unlock(&agent->lock);
}

/* Notify waiting threads that the spans of a layerwise load were started, up to `span`. */
static void note_span(struct flexkv_agent *agent, const struct op *op, uint32_t span)
{
    if ((op->msg.flags & (FLEXKV_OP_LAYERWISE | FLEXKV_OP_MORE)) != FLEXKV_OP_LAYERWISE)
        return;
    pthread_mutex_lock(&agent->lock);
    if (op->msg.task_id > agent->layerwise_task)
        agent->layerwise_spans = 0;
    if (op->msg.task_id >= agent->layerwise_task) {
        agent->layerwise_task = op->msg.task_id;
        if (span + 1 > agent->layerwise_spans)
            agent->layerwise_spans = span + 1;
    }
    pthread_cond_broadcast(&agent->changed);
    pthread_mutex_unlock(&agent->lock);
}

/* The op's next span, or the end of it, when all blocks of one were started. */
static void end_span(struct flexkv_agent *agent, struct op *op)
{
    const struct flexkv_backend *backend = &agent->options.backend;

    if (op->started < op->msg.count)
        return;
    if (op->msg.flags & FLEXKV_OP_LAYERWISE && backend->mark && backend->mark(backend->context, op->span)) {
        op->failed = op->cancelled = 1;
        lose_layers(agent, op);
    }
    note_span(agent, op, op->span);
    if (op->span < last_span(agent, op)) {
        op->span++;
        op->started = 0;
    }
}

/* Blocks of a span have arrived: if these are all, signal its layers; fail the load if that is impossible. */
static void signal_span(struct flexkv_agent *agent, struct op *op, uint32_t span, int all)
{
    const struct flexkv_signals *signals = &agent->signals;
    const int *fds;

    if (!op->msg.counter)
        return;
    pthread_mutex_lock(&agent->lock);
    agent->layers_lost |= op->msg.counter > signals->num_counters;
    op->failed |= agent->layers_lost;
    if (!op->failed && all && !(op->msg.flags & FLEXKV_OP_MORE)) {
        fds = signals->fds + (uint64_t)(op->msg.counter - 1) * signals->num_layers;
        for (uint32_t layer = 0; layer < signals->num_layers; layer++)
            if (signals->span_of[layer] == span)
                eventfd_write(fds[layer], 1);
    }
    pthread_mutex_unlock(&agent->lock);
}

/* If the op has failed, its blocks [first, until) have too, but for those that were in place. */
static void fail_blocks(struct op *op, uint32_t first, uint32_t until)
{
    for (uint32_t i = first; op->failed && i < until; i++)
        op->ok[i] = op->ok[i] && op->slots[i] == FLEXKV_IN_PLACE;
}

static int finish(struct flexkv_agent *agent, struct op *op, uint32_t first)
{
    int rc;

    note_span(agent, op, last_span(agent, op));
    fail_blocks(op, first, op->msg.count);
    op->done = op->msg.count;
    unlink_op(agent, op);
    keep_outcome(agent, op);      /* before the controller's answer, so that the outcome is there when the answer is */
    rc = report(agent, op, first, 1);
    free(op);
    return rc;
}

static int accept_op(struct flexkv_agent *agent, uint64_t size)
{
    const struct flexkv_pages *pages = &agent->options.at;
    struct flexkv_msg_op msg;
    uint64_t numbers_bytes;
    struct op *op, **at;

    if (size < sizeof(msg))
        return -EBADMSG;
    memcpy(&msg, agent->buffer, sizeof(msg));
    if (msg.groups != agent->options.at.num_groups || !msg.count || msg.kind < FLEXKV_D2H || msg.kind > FLEXKV_P2D)
        return -EBADMSG;
    if (msg.kind != FLEXKV_H2D)
        msg.flags &= ~(uint32_t)(FLEXKV_OP_LAYERWISE | FLEXKV_OP_SHARE);
    if (msg.flags & FLEXKV_OP_LAYERWISE)
        msg.flags &= ~(uint32_t)FLEXKV_OP_SHARE;
    if (msg.flags & FLEXKV_OP_SHARE || msg.kind == FLEXKV_P2D)
        msg.counter = 0;
    numbers_bytes = (1ull + msg.groups) * msg.count * sizeof(int32_t);
    if (size != sizeof(msg) + numbers_bytes)
        return -EBADMSG;
    op = calloc(1, sizeof(*op) + numbers_bytes + msg.count);
    if (!op)
        return -ENOMEM;
    op->msg = msg;
    if ((op->cancelled = (msg.flags & FLEXKV_OP_CANCELLED) != 0 || !spans_of(agent, op)->count ||
                         (msg.kind == FLEXKV_P2D && agent->exchange_over)))
        lose_layers(agent, op);
    op->span = spans_of(agent, op)->first;
    op->slots = (int32_t *)(op + 1);
    op->pages = op->slots + msg.count;
    op->ok = (uint8_t *)(op + 1) + numbers_bytes;
    memcpy(op->slots, agent->buffer + sizeof(msg), numbers_bytes);
    for (uint32_t i = 0; i < msg.count; i++)
        if (op->slots[i] != FLEXKV_IN_PLACE && !in_range(pages, op, i))
            op->slots[i] = NO_SLOT;
    for (at = &agent->ops; *at; at = &(*at)->next)
        ;
    *at = op;
    return 0;
}

/* A load that signals its layers is finished rather than cancelled, once it may start: if it ended half-way, its layers
 * could never be signalled, nor those of later loads. */
static int is_finished_instead(struct flexkv_agent *agent, const struct op *op)
{
    return op->msg.counter && !op->cancelled && op->msg.fence <= atomic_load(&agent->load_fence);
}

static int accept_cancel(struct flexkv_agent *agent, uint64_t size)
{
    struct flexkv_msg_cancel msg;

    if (size != sizeof(msg))
        return -EBADMSG;
    memcpy(&msg, agent->buffer, sizeof(msg));
    for (struct op *op = agent->ops; op; op = op->next)
        if (op->msg.op_id == msg.op_id && !is_finished_instead(agent, op)) {
            op->cancelled = 1;
            lose_layers(agent, op);
        }
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

/* The oldest op of the kind that may start and has blocks that have not; of those that compute waits for, if any. */
static struct op *next_op(struct flexkv_agent *agent, enum flexkv_kind kind)
{
    uint64_t fence = atomic_load(kind == FLEXKV_D2H ? &agent->save_fence : &agent->load_fence);
    struct op *oldest = NULL;

    for (struct op *op = agent->ops; op; op = op->next)
        if (op->msg.kind == kind && !op->cancelled && op->msg.fence <= fence && op->started < op->msg.count) {
            if (op->msg.flags & FLEXKV_OP_LAYERWISE)
                return op;
            oldest = oldest ? oldest : op;
        }
    return oldest;
}

static int under_way(const struct flexkv_agent *agent, const struct op *op)
{
    for (const struct window *window = agent->windows[op->msg.kind]; window; window = window->next)
        if (window->op == op)
            return 1;
    return 0;
}

/* Whether the backend must move a block of a span; `pages`: those of the span's group. */
static int is_moved(const struct op *op, const struct flexkv_span *span, const int32_t *pages, uint32_t block)
{
    return span->num_regions && op->slots[block] >= 0 && pages[block] >= 0;
}

/* Pass the op's blocks up to `until`, which have nothing to move in its span. Returns their number. */
static int skip(struct flexkv_agent *agent, struct op *op, uint32_t until)
{
    for (uint32_t i = op->started; i < until; i++)
        if (op->slots[i] == NO_SLOT)
            lose_layers(agent, op);
        else
            op->ok[i] = op->span == last_span(agent, op);
    return (int)(until - op->started);
}

/* Give the backend the next blocks of an op of the kind: 1, or 0 when there are none or it has no room. */
static int start_some(struct flexkv_agent *agent, enum flexkv_kind kind)
{
    const struct flexkv_backend *backend = &agent->options.backend;
    const struct flexkv_pages *at = &agent->options.at;
    struct op *op = next_op(agent, kind);
    const struct flexkv_span *span;
    struct window *window, **end;
    const int32_t *pages;
    uint32_t run;
    int taken, is_empty;

    if (!op)
        return 0;
    span = at->spans + op->span;
    pages = op->pages + span->group * op->msg.count;
    run = op->started;
    is_empty = !is_moved(op, span, pages, run);
    while (run < op->msg.count && is_moved(op, span, pages, run) == !is_empty)
        run++;
    window = malloc(sizeof(*window));
    taken = !window    ? -ENOMEM
            : is_empty ? skip(agent, op, run)
                       : backend->start(backend->context, at, kind, op->msg.fence, op->span, op->slots + op->started,
                                        pages + op->started, run - op->started);
    if (taken <= 0) {
        free(window);
        if (taken < 0) {
            op->cancelled = 1;
            lose_layers(agent, op);
        }
        return taken < 0;
    }
    if (!is_empty && op->span == last_span(agent, op))
        memset(op->ok + op->started, 1, (uint32_t)taken);     /* reported only when they have arrived */
    op->started += (uint32_t)taken;
    *window = (struct window){ NULL, op, op->started, op->span, is_empty };
    for (end = &agent->windows[kind]; *end; end = &(*end)->next)
        ;
    *end = window;
    end_span(agent, op);
    return 1;
}

static int poll_window(struct flexkv_agent *agent, enum flexkv_kind kind, const struct window *window)
{
    return window->is_empty ? 1 : agent->options.backend.poll(agent->options.backend.context, kind);
}

/* Take note of a window of the kind that has ended: 1, 0 when none has, or negative errno. */
static int end_window(struct flexkv_agent *agent, enum flexkv_kind kind)
{
    struct window *window = agent->windows[kind];
    uint32_t first, until;
    struct op *op;
    int rc, whole;

    if (!window || !(rc = poll_window(agent, kind, window)))
        return 0;
    op = window->op;
    first = op->done;
    until = window->until;
    agent->windows[kind] = window->next;
    if (rc < 0) {
        op->failed = op->cancelled = 1;
        lose_layers(agent, op);
    }
    whole = window->span == last_span(agent, op) && (!window->is_empty || until == op->msg.count);
    signal_span(agent, op, window->span, until == op->msg.count);
    free(window);
    if (!whole)
        return 1;
    if (until == op->msg.count)
        return (rc = finish(agent, op, first)) ? rc : 1;
    fail_blocks(op, first, until);
    op->done = until;
    return (rc = report(agent, op, first, 0)) ? rc : 1;
}

/* Finish ops that have nothing under way and nothing left to start: 1 if there was one, or negative errno. Layerwise
 * ones in their order: when one has ended, those before it have ended. */
static int finish_idle(struct flexkv_agent *agent)
{
    int behind = 0, layerwise;

    for (struct op *op = agent->ops; op; behind |= layerwise, op = op->next) {
        layerwise = (op->msg.flags & FLEXKV_OP_LAYERWISE) != 0;
        if (layerwise && behind)
            continue;
        if ((op->cancelled || (op->started == op->msg.count && op->span == last_span(agent, op))) &&
            !under_way(agent, op)) {
            int rc = finish(agent, op, op->done);

            return rc ? rc : 1;
        }
    }
    return 0;
}

/* Once the controller has ended the exchange, start no P2D, and report the end of the last one. Those that are under way
 * fail: a peer's memory may be free before they end. */
static void end_exchange(struct flexkv_agent *agent)
{
    if (!agent->exchange_over && flexkv_ring_read_note(&agent->submissions, FLEXKV_NOTE_EXCHANGE_OVER)) {
        agent->exchange_over = 1;
        for (struct op *op = agent->ops; op; op = op->next)
            if (op->msg.kind == FLEXKV_P2D)
                op->failed = op->cancelled = 1;
    }
    if (agent->exchange_over && !agent->windows[FLEXKV_P2D])
        atomic_store(&agent->peers_released, 1);
}

/* One round of work: 1 if something has changed, 0 if there is nothing to do now, or negative errno. */
static int work(struct flexkv_agent *agent)
{
    static const enum flexkv_kind kinds[] = { FLEXKV_P2D, FLEXKV_H2D, FLEXKV_D2H };
    int changed = 0, rc;

    end_exchange(agent);
    if ((rc = finish_idle(agent)))
        return rc;
    for (int i = 0; i < 3; i++) {
        changed |= start_some(agent, kinds[i]);
        if ((rc = end_window(agent, kinds[i])) < 0)
            return rc;
        changed |= rc;
    }
    return changed;
}

/* Whether the engine may be waiting for an op under way: a small one, or one that signals each layer. */
static int urgent(const struct flexkv_agent *agent)
{
    for (int kind = FLEXKV_D2H; kind < FLEXKV_NUM_KINDS; kind++)
        for (const struct window *window = agent->windows[kind]; window; window = window->next)
            if (window->op->msg.counter || window->op->msg.op_blocks * agent->options.at.block_bytes <= SMALL_BYTES)
                return 1;
    return 0;
}

/* Report the fences of compute that is done, at a low rate where the device must be asked. */
static void report_fences(struct flexkv_agent *agent)
{
    const struct flexkv_backend *backend = &agent->options.backend;
    uint64_t now = backend->reached ? now_ns() : 0;
    int early = backend->reached && now - agent->fences_read_ns < FENCE_NS;

    agent->fences_behind = 0;
    agent->fences_read_ns = early ? agent->fences_read_ns : now;
    for (int kind = FLEXKV_D2H; kind <= FLEXKV_H2D; kind++) {
        uint64_t advanced = atomic_load(kind == FLEXKV_H2D ? &agent->load_fence : &agent->save_fence);

        if (agent->reached[kind] == advanced)
            continue;
        if (!early)
            agent->reached[kind] = backend->reached ? backend->reached(backend->context, kind, advanced) : advanced;
        agent->fences_behind |= agent->reached[kind] < advanced;
        flexkv_ring_note(&agent->completions, kind == FLEXKV_H2D ? FLEXKV_NOTE_LOAD_FENCE : FLEXKV_NOTE_SAVE_FENCE,
                         agent->reached[kind]);
    }
}

static int sleep_until_news(struct flexkv_agent *agent)
{
    int busy = agent->windows[FLEXKV_D2H] || agent->windows[FLEXKV_H2D] || agent->windows[FLEXKV_P2D];
    int soon = busy && urgent(agent);
    struct timespec pause = { 0, soon ? POLL_NS : busy ? BULK_POLL_NS : FENCE_NS };
    struct pollfd fds[] = { { agent->options.submission_event_fd, POLLIN, 0 }, { agent->wake_fd, POLLIN, 0 },
                            { agent->options.socket_fd, POLLIN | POLLRDHUP, 0 } };
    eventfd_t count;

    if (soon && now_ns() - agent->last_news_ns < SPIN_NS) {
        sched_yield();                 /* to the controller, where there are few processors */
        return 0;
    }
    if (flexkv_ring_set_waiting(&agent->submissions, 1))
        return 0;
    if (ppoll(fds, 3, busy || agent->fences_behind ? &pause : NULL, NULL) < 0 && errno != EINTR)
        return -errno;
    if (fds[0].revents)
        eventfd_read(agent->options.submission_event_fd, &count);
    if (fds[1].revents)
        eventfd_read(agent->wake_fd, &count);
    return 0;
}

/* Wait for the windows that are under way: 0, or -ETIMEDOUT, and the device may still touch pages and slots. */
static int come_to_rest(struct flexkv_agent *agent)
{
    uint64_t until = now_ns() + agent->options.rest_timeout_ms * 1000000ull;
    struct timespec pause = { 0, POLL_NS };
    struct window *window;

    for (int kind = FLEXKV_D2H; kind < FLEXKV_NUM_KINDS; kind++)
        while ((window = agent->windows[kind])) {
            while (!poll_window(agent, (enum flexkv_kind)kind, window)) {
                if (now_ns() > until)
                    return -ETIMEDOUT;
                nanosleep(&pause, NULL);
            }
            agent->windows[kind] = window->next;
            free(window);
        }
    return 0;
}

static void *run(void *argument)
{
    static const char farewell = FLEXKV_FAREWELL;
    struct flexkv_agent *agent = argument;
    struct flexkv_backend *backend = &agent->options.backend;
    struct op *op;
    int rc = backend->attach ? backend->attach(backend->context) : 0;

    while (!rc) {
        report_fences(agent);
        if ((rc = hung_up(agent)) || (rc = drain_submissions(agent)) || (rc = work(agent)) < 0)
            break;
        if (rc)
            agent->last_news_ns = now_ns();
        rc = rc ? 0 : sleep_until_news(agent);
    }
    atomic_store(&agent->at_rest, !come_to_rest(agent));
    /* unfinished ops have failed, and their outcomes must be kept for the owner */
    while ((op = agent->ops)) {
        memset(op->ok, 0, op->msg.count);
        agent->ops = op->next;
        keep_outcome(agent, op);
        free(op);
    }
    /* from here on nothing touches a slot or a page, and the controller may use the slots again. Without the farewell it
     * waits for the end of this process. */
    if (atomic_load(&agent->at_rest))
        send(agent->options.socket_fd, &farewell, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
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
    if (!rc && options->at.moves[FLEXKV_P2D].count)
        flexkv_ring_note(&agent->completions, FLEXKV_NOTE_EXCHANGE, 1);
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

uint64_t flexkv_agent_populated(const struct flexkv_agent *agent, int *all)
{
    uint64_t slots;

    *all = flexkv_ring_read_note(&agent->submissions, FLEXKV_NOTE_ALL_POPULATED) != 0;   /* first: the last slots are in */
    slots = flexkv_ring_read_note(&agent->submissions, FLEXKV_NOTE_POPULATED);
    return slots < agent->options.at.num_slots ? slots : agent->options.at.num_slots;
}

uint64_t flexkv_agent_lowered(const struct flexkv_agent *agent)
{
    return flexkv_ring_read_note(&agent->submissions, FLEXKV_NOTE_LOWERED);
}

int flexkv_agent_peers_released(const struct flexkv_agent *agent)
{
    return atomic_load(&agent->peers_released);
}

void flexkv_agent_report(struct flexkv_agent *agent, uint32_t note, uint64_t value)
{
    flexkv_ring_note(&agent->completions, note, value);
    eventfd_write(agent->options.completion_event_fd, 1);
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
    struct timespec until = after(CLOCK_MONOTONIC, timeout_ms);
    int rc = 0, ready;

    pthread_mutex_lock(&agent->lock);
    while (!agent->first && !atomic_load(&agent->status) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&agent->changed, &agent->lock, &until);
    ready = agent->first || atomic_load(&agent->status);
    pthread_mutex_unlock(&agent->lock);
    return ready;
}

static int span_started(const struct flexkv_agent *agent, uint64_t task_id, uint32_t span)
{
    return agent->layerwise_task > task_id || (agent->layerwise_task == task_id && agent->layerwise_spans > span);
}

int flexkv_agent_wait_span(struct flexkv_agent *agent, uint64_t task_id, uint32_t span, int timeout_ms)
{
    struct timespec until = after(CLOCK_MONOTONIC, timeout_ms);
    int rc = 0, started;

    pthread_mutex_lock(&agent->lock);
    while (!(started = span_started(agent, task_id, span)) && !atomic_load(&agent->status) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&agent->changed, &agent->lock, &until);
    pthread_mutex_unlock(&agent->lock);
    return started ? 0 : rc ? -rc : atomic_load(&agent->status);
}

void flexkv_agent_set_signals(struct flexkv_agent *agent, const struct flexkv_signals *signals)
{
    pthread_mutex_lock(&agent->lock);
    agent->signals = *signals;
    agent->layers_lost = 0;
    pthread_mutex_unlock(&agent->lock);
}

int flexkv_agent_status(struct flexkv_agent *agent)
{
    return atomic_load(&agent->status);
}

int flexkv_agent_stop(struct flexkv_agent *agent)
{
    struct timespec until = after(CLOCK_MONOTONIC, (int)agent->options.rest_timeout_ms + JOIN_MS);
    int rc = 0;

    atomic_store(&agent->stop, 1);
    eventfd_write(agent->wake_fd, 1);
    /* The status is the last thing that the thread writes. ThreadSanitizer does not know pthread_clockjoin_np, which
     * could wait for the end alone. */
    pthread_mutex_lock(&agent->lock);
    while (!atomic_load(&agent->status) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&agent->changed, &agent->lock, &until);
    pthread_mutex_unlock(&agent->lock);
    until = after(CLOCK_REALTIME, JOIN_MS);
    if (!atomic_load(&agent->status) || pthread_timedjoin_np(agent->thread, NULL, &until)) {
        shutdown(agent->options.socket_fd, SHUT_RDWR);        /* the controller learns of it now */
        pthread_detach(agent->thread);
        return -ETIMEDOUT;
    }
    if (!atomic_load(&agent->at_rest))
        return -ETIMEDOUT;
    free_agent(agent);
    return 0;
}
