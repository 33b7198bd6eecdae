#include "cuda_copy.h"
#include "clock.h"
#include "move_kernel.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define NUM_BUFFERS 3             /* staging buffers of each kind: one fills, one empties, one is ready */
#define MAX_WINDOWS 16            /* windows in flight, of each kind */
#define MAX_AHEAD 256             /* the same for layerwise loads: the engine waits until all windows are enqueued */
#define DIRECT_BYTES (128u << 10) /* up to here the kernel copies over the bus, without staging: lower latency */
#define BATCH_CHUNK_BYTES (4u << 20)        /* from here on the copy engine needs no staging */
#define MAX_BATCH 1024            /* copies of one call */
#define PEER_WINDOWS 4            /* windows of one launch that reads peers: NVLink is several times as fast as the bus */
#define FIRST_WINDOW_SHARE 4      /* the first window of a burst is smaller: the bus starts earlier */
#define NUM_FENCES 64             /* steps back that an op finds its own fence; older ones wait for a later step */
#define REGISTER_BYTES (16u << 20) /* pinned at a time. The driver holds a lock meanwhile that kernel launches need:
                                    * 16 MiB of small pages take about 5 ms (docs/design/0016-pool-start.md) */
#define PIN_WAIT_MS 50            /* longest wait for copies of memory that is not registered, before a part is pinned */
#define MOST_FOR_A_BLOCK (64u << 20)        /* up to here a staging buffer grows so that a block fits */

struct lane {                     /* one direction */
    cu_stream kernel, copy;
    cu_event fences[NUM_FENCES];  /* the state of the engine's stream when it advanced to fence_of[i] */
    _Atomic uint64_t fence_of[NUM_FENCES];
    _Atomic uint64_t num_fences;
    cu_event filled[NUM_BUFFERS]; /* H2D: bytes are in the buffer; D2H: the pages are gathered */
    cu_event ended[MAX_AHEAD];
    cu_event *marks;              /* by span: the loads that were started before the mark */
    cu_ptr buffers[NUM_BUFFERS];
    int64_t user[NUM_BUFFERS];    /* window that used the buffer last */
    uint64_t num_started, num_ended;
    uint64_t num_staged;
};

struct flexkv_cuda_copy {
    const struct flexkv_cuda *api;
    struct flexkv_cuda_options options;
    const struct flexkv_pages *at;
    struct lane lanes[FLEXKV_NUM_KINDS];        /* by kind; [0] is not used */
    cu_ptr regions;
    uint64_t chunk_slots;         /* slots that are registered at a time; no copy crosses such a part */
    _Atomic uint64_t registered;  /* slots; a multiple of chunk_slots until the last part */
    _Atomic int registering;      /* more will be */
    _Atomic int is_stuck;         /* a part could not be unregistered */
    _Atomic int pin_waits;        /* for the lock: copies of memory that is not registered wait, too */
    pthread_mutex_t pinning;      /* held while a part is registered, or copies of other memory are made */
    _Atomic int error;            /* the first; later calls may only repeat it */
    const char *_Atomic failed;
};

static int keep_error(struct flexkv_cuda_copy *copy, cu_result result, const char *function)
{
    int none = CU_SUCCESS;

    if (result != CU_SUCCESS && atomic_compare_exchange_strong(&copy->error, &none, result))
        atomic_store(&copy->failed, function);
    return result != CU_SUCCESS;
}

#define TRY(function, ...) keep_error(copy, copy->api->function(__VA_ARGS__), #function)

/* Make the stream wait for the step of a fence: the oldest known step that is not before it. If the event is recorded
 * again meanwhile, the stream waits for a later step: too long, but never too short. */
static int wait_fence(struct flexkv_cuda_copy *copy, struct lane *lane, uint64_t fence, cu_stream stream)
{
    uint64_t number = atomic_load(&lane->num_fences), back;

    for (back = 1; back < number && back < NUM_FENCES; back++)
        if (atomic_load(&lane->fence_of[(number - 1 - back) % NUM_FENCES]) < fence)
            break;
    return number && TRY(cuStreamWaitEvent, stream, lane->fences[(number - back) % NUM_FENCES], 0);
}

/* The copies of a window. */
struct job {
    enum flexkv_kind kind;
    uint64_t fence;
    const struct flexkv_span *span;
    const int32_t *slots, *pages;
    uint32_t count;
    int pinned;
};

/* Distance of two blocks in a staging buffer, in bytes. */
static uint64_t stride_of(const struct flexkv_span *span)
{
    return (span->bytes + 15) / 16 * 16;
}

static uint64_t pool_address(const struct flexkv_cuda_copy *copy, int32_t slot)
{
    return (uint64_t)copy->at->pool + (uint64_t)slot * copy->at->slot_bytes;
}

/* Move the span between the pages and the slots that begin at `far`; of a P2D, the peers' pages take their place. */
static int launch(struct flexkv_cuda_copy *copy, const struct job *job, cu_ptr far, uint64_t far_stride, int direct)
{
    struct flexkv_move move = {
        .function = copy->options.move,
        .regions = copy->regions + job->span->first * sizeof(struct flexkv_region),
        .num_regions = job->span->num_regions,
        .max_chunk = job->span->max_chunk,
        .num_ctas = copy->options.num_ctas,
        .far = far,
        .far_stride = far_stride,
        .gather = job->kind == FLEXKV_D2H,
        .slots = !direct ? NULL : job->kind == FLEXKV_P2D ? job->pages : job->slots,
        .pages = job->pages,
        .count = job->count,
    };

    return keep_error(copy, flexkv_launch_move(copy->api, &move, copy->lanes[job->kind].kernel), "cuLaunchKernel");
}

/* Copies that are to be made, in one call where the driver can: it leaves no gaps between them. */
struct batch {
    int pinned;                   /* else the driver copies through memory of its own, one by one */
    size_t count;
    cu_ptr from[MAX_BATCH], to[MAX_BATCH];
    size_t sizes[MAX_BATCH];
};

static int flush(struct flexkv_cuda_copy *copy, struct batch *batch, cu_stream stream)
{
    struct cu_memcpy_attributes order = { .src_access_order = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM };
    size_t first = 0, failed, count = batch->count;

    batch->count = 0;
    if (count > 1 && batch->pinned && copy->api->cuMemcpyBatchAsync)
        return TRY(cuMemcpyBatchAsync, batch->to, batch->from, batch->sizes, count, &order, &first, 1, &failed, stream);
    for (size_t i = 0; i < count; i++)
        if (TRY(cuMemcpyAsync, batch->to[i], batch->from[i], batch->sizes[i], stream))
            return 1;
    return 0;
}

static int add(struct flexkv_cuda_copy *copy, struct batch *batch, enum flexkv_kind kind, uint64_t device,
               uint64_t far, uint64_t bytes, cu_stream stream)
{
    batch->from[batch->count] = kind == FLEXKV_D2H ? device : far;
    batch->to[batch->count] = kind == FLEXKV_D2H ? far : device;
    batch->sizes[batch->count++] = bytes;
    return batch->count == MAX_BATCH ? flush(copy, batch, stream) : 0;
}

/* Copy a run of consecutive slots, where a block is only a part of a slot. */
static int copy_rows(struct flexkv_cuda_copy *copy, const struct job *job, uint64_t staged, uint64_t host,
                     uint32_t count, cu_stream stream)
{
    int down = job->kind == FLEXKV_D2H;
    uint64_t stride = stride_of(job->span);
    struct cu_memcpy2d rows = { .src_type = CU_MEMORYTYPE_UNIFIED, .src_device = down ? staged : host,
                                .src_pitch = down ? stride : copy->at->slot_bytes,
                                .dst_type = CU_MEMORYTYPE_UNIFIED, .dst_device = down ? host : staged,
                                .dst_pitch = down ? copy->at->slot_bytes : stride,
                                .width = job->span->bytes, .height = count };

    return TRY(cuMemcpy2DAsync, &rows, stream);
}

/* Copy between a staging buffer and slots, by the copy engine. */
static int copy_runs(struct flexkv_cuda_copy *copy, const struct job *job, cu_ptr staged, cu_stream stream)
{
    uint64_t stride = stride_of(job->span), bytes = job->span->bytes;
    int whole = bytes == copy->at->slot_bytes; /* a slot may have other bytes before or after the span's */
    const int32_t *slots = job->slots;
    struct batch batch = { .pinned = job->pinned };

    for (uint32_t i = 0, run; i < job->count; i += run) {
        cu_ptr device = staged + i * stride;
        uint64_t host = pool_address(copy, slots[i]) + job->span->slot_offset;

        for (run = 1; i + run < job->count && slots[i + run] == slots[i] + (int32_t)run &&
                      (uint64_t)slots[i + run] % copy->chunk_slots; run++)
            ;
        if (run == 1 || whole ? add(copy, &batch, job->kind, device, host, run * bytes, stream)
                              : copy_rows(copy, job, device, host, run, stream))
            return 1;
    }
    return flush(copy, &batch, stream);
}

/* Address of a region's bytes in a block, on the other side of its page. */
static uint64_t far_address(const struct flexkv_cuda_copy *copy, const struct job *job,
                            const struct flexkv_region *region, uint32_t block)
{
    return region->slot_offset + (job->kind == FLEXKV_P2D ? (uint64_t)job->pages[block] * job->span->peer_stride
                                                          : pool_address(copy, job->slots[block]));
}

/* Copy each chunk between pages and slots or the peers' pages, by the copy engine. */
static int copy_chunks(struct flexkv_cuda_copy *copy, const struct job *job, cu_stream stream)
{
    const struct flexkv_region *first = copy->at->regions + job->span->first, *end = first + job->span->num_regions;
    struct batch batch = { .pinned = job->pinned };

    for (uint32_t i = 0; i < job->count; i++)
        for (const struct flexkv_region *region = first; region < end; region++)
            if (add(copy, &batch, job->kind, region->base + (uint64_t)(job->pages[i] * region->page_stride),
                    far_address(copy, job, region, i), region->chunk_bytes, stream))
                return 1;
    return flush(copy, &batch, stream);
}

static int move_staged(struct flexkv_cuda_copy *copy, const struct job *job)
{
    struct lane *lane = &copy->lanes[job->kind];
    uint32_t b = lane->num_staged % NUM_BUFFERS;
    cu_ptr buffer = lane->buffers[b], far = buffer - job->span->slot_offset;
    uint64_t stride = stride_of(job->span);

    if (job->kind == FLEXKV_D2H) {
        if (wait_fence(copy, lane, job->fence, lane->kernel) || launch(copy, job, far, stride, 0) ||
            TRY(cuEventRecord, lane->filled[b], lane->kernel) ||
            TRY(cuStreamWaitEvent, lane->copy, lane->filled[b], 0) || copy_runs(copy, job, buffer, lane->copy))
            return 1;
    } else if (copy_runs(copy, job, buffer, lane->copy) || TRY(cuEventRecord, lane->filled[b], lane->copy) ||
               TRY(cuStreamWaitEvent, lane->kernel, lane->filled[b], 0) ||
               wait_fence(copy, lane, job->fence, lane->kernel) || launch(copy, job, far, stride, 0)) {
        return 1;
    }
    lane->user[b] = (int64_t)lane->num_started;
    lane->num_staged++;
    return 0;
}

/* Whether the span is of layerwise loads alone. */
static int is_layer(const struct flexkv_pages *at, uint32_t span)
{
    return at->layers.first != at->moves[FLEXKV_H2D].first && span - at->layers.first < at->layers.count;
}

static int attach(void *context)
{
    struct flexkv_cuda_copy *copy = context;

    return TRY(cuCtxPushCurrent, copy->options.context) ? -EIO : 0;
}

/* Number of leading blocks that are all in registered memory (*pinned), or all in memory that is not registered: those
 * copies are slow, but right. */
static uint32_t leading(struct flexkv_cuda_copy *copy, const int32_t *slots, uint32_t count, int *pinned)
{
    uint64_t limit = atomic_load(&copy->registered);
    uint32_t n = 0;

    *pinned = count && (uint64_t)slots[0] < limit;
    while (n < count && ((uint64_t)slots[n] < limit) == *pinned)
        n++;
    return n;
}

static uint32_t strategy_of(const struct flexkv_cuda_copy *copy, const struct job *job)
{
    uint32_t strategy = copy->options.strategy;
    const struct flexkv_span *span = job->span;

    if (job->kind == FLEXKV_P2D)  /* both sides are GPU memory: the kernel needs no staging */
        return strategy == FLEXKV_BATCH || span->bytes / span->num_regions >= BATCH_CHUNK_BYTES ? FLEXKV_BATCH
                                                                                               : FLEXKV_DIRECT;
    if (strategy == FLEXKV_AUTO)
        strategy = span->bytes / span->num_regions >= BATCH_CHUNK_BYTES          ? FLEXKV_BATCH
                   : job->pinned && job->count * span->bytes <= DIRECT_BYTES      ? FLEXKV_DIRECT
                                                                                  : FLEXKV_STAGED;
    if (strategy == FLEXKV_DIRECT && !job->pinned)
        strategy = FLEXKV_BATCH;
    if (strategy == FLEXKV_STAGED && stride_of(span) > copy->options.window_bytes)
        strategy = FLEXKV_BATCH;  /* not one block fits into a buffer */
    return strategy;
}

/* The largest number of blocks for a window: for a staged one, those that fit into a buffer. */
static uint32_t fit(const struct flexkv_cuda_copy *copy, const struct job *job, uint32_t strategy)
{
    const struct lane *lane = &copy->lanes[job->kind];
    uint64_t window = copy->options.window_bytes, stride = stride_of(job->span);

    if (job->kind == FLEXKV_P2D)
        window *= PEER_WINDOWS;
    if (strategy != FLEXKV_STAGED)
        return (uint32_t)(window / stride + 1);
    if (lane->num_started == lane->num_ended && job->count * stride > window / FIRST_WINDOW_SHARE)
        window = stride > window / FIRST_WINDOW_SHARE ? stride : window / FIRST_WINDOW_SHARE;
    return (uint32_t)(window / stride);
}

/* Enqueue the copies of a window. */
static int enqueue(struct flexkv_cuda_copy *copy, const struct job *job, uint32_t strategy, cu_stream last)
{
    if (strategy == FLEXKV_STAGED)
        return move_staged(copy, job);
    return wait_fence(copy, &copy->lanes[job->kind == FLEXKV_D2H ? FLEXKV_D2H : FLEXKV_H2D], job->fence, last) ||
           (strategy == FLEXKV_BATCH  ? copy_chunks(copy, job, last)
            : job->kind == FLEXKV_P2D ? launch(copy, job, 0, job->span->peer_stride, 1)
                                      : launch(copy, job, (uint64_t)copy->at->pool, copy->at->slot_bytes, 1));
}

static int start(void *context, const struct flexkv_pages *at, enum flexkv_kind kind, uint64_t fence, uint32_t span,
                 const int32_t *slots, const int32_t *pages, uint32_t count)
{
    struct flexkv_cuda_copy *copy = context;
    struct lane *lane = &copy->lanes[kind];
    struct job job = { kind, fence, &at->spans[span], slots, pages, count, 0 };
    uint32_t strategy, most;
    cu_stream last;
    int failed;

    if (atomic_load(&copy->error))
        return -EIO;
    if (lane->num_started - lane->num_ended >= (is_layer(at, span) ? MAX_AHEAD : MAX_WINDOWS))
        return 0;
    job.count = count < FLEXKV_MOVE_BLOCKS ? count : FLEXKV_MOVE_BLOCKS;
    job.pinned = 1;
    if (kind != FLEXKV_P2D)
        job.count = leading(copy, slots, job.count, &job.pinned);
    strategy = strategy_of(copy, &job);
    most = fit(copy, &job, strategy);
    job.count = job.count < most ? job.count : most;
    if (strategy == FLEXKV_STAGED && lane->num_staged >= NUM_BUFFERS) {
        int64_t user = lane->user[lane->num_staged % NUM_BUFFERS];

        if (user >= (int64_t)lane->num_ended && !is_layer(at, span))
            return 0;             /* all buffers are in use */
        if (user >= (int64_t)lane->num_ended && TRY(cuStreamWaitEvent, lane->copy, lane->ended[user % MAX_AHEAD], 0))
            return -EIO;
    }
    last = strategy == FLEXKV_BATCH || (strategy == FLEXKV_STAGED && kind == FLEXKV_D2H) ? lane->copy : lane->kernel;
    if (!job.pinned && (atomic_load(&copy->pin_waits) || pthread_mutex_trylock(&copy->pinning)))
        return 0;                 /* a part is being registered: flexkv_agent_advance wakes the agent after that */
    failed = enqueue(copy, &job, strategy, last);
    if (!job.pinned)
        pthread_mutex_unlock(&copy->pinning);
    if (failed || TRY(cuEventRecord, lane->ended[lane->num_started % MAX_AHEAD], last)) {
        copy->api->cuStreamSynchronize(lane->copy);           /* no started copy may outlive its slots */
        copy->api->cuStreamSynchronize(lane->kernel);
        return -EIO;
    }
    lane->num_started++;
    return (int)job.count;
}

/* Both streams of the lane: a window may have ended on either. */
static int mark(void *context, uint32_t span)
{
    struct flexkv_cuda_copy *copy = context;
    struct lane *lane = &copy->lanes[FLEXKV_H2D];

    return TRY(cuEventRecord, lane->marks[0], lane->copy) ||
           TRY(cuStreamWaitEvent, lane->kernel, lane->marks[0], 0) ||
           TRY(cuEventRecord, lane->marks[span + 1], lane->kernel) ? -EIO : 0;
}

/* Fences only grow, and `advanced` was read before the newest event. So when that event has happened, `advanced` is
 * reached. */
static uint64_t reached(void *context, enum flexkv_kind kind, uint64_t advanced)
{
    struct flexkv_cuda_copy *copy = context;
    struct lane *lane = &copy->lanes[kind];
    uint64_t number = atomic_load(&lane->num_fences);

    if (!number)
        return advanced;
    for (uint64_t back = 1; back <= number && back < NUM_FENCES; back++) {
        uint64_t fence = atomic_load(&lane->fence_of[(number - back) % NUM_FENCES]);

        if (copy->api->cuEventQuery(lane->fences[(number - back) % NUM_FENCES]) == CU_SUCCESS)
            return back == 1 || fence > advanced ? advanced : fence;
    }
    return 0;
}

cu_result flexkv_cuda_copy_follow(struct flexkv_cuda_copy *copy, uint32_t span, cu_stream stream)
{
    cu_result result = copy->api->cuCtxPushCurrent(copy->options.context);
    cu_context popped;

    if (result)
        return result;
    result = copy->api->cuStreamWaitEvent(stream, copy->lanes[FLEXKV_H2D].marks[span + 1], 0);
    copy->api->cuCtxPopCurrent(&popped);
    return result;
}

static int poll_window(void *context, enum flexkv_kind kind)
{
    struct flexkv_cuda_copy *copy = context;
    struct lane *lane = &copy->lanes[kind];
    cu_result result = copy->api->cuEventQuery(lane->ended[lane->num_ended % MAX_AHEAD]);

    if (result == CU_ERROR_NOT_READY)
        return 0;
    if (result != CU_SUCCESS) {
        keep_error(copy, result, "cuEventQuery");
        copy->api->cuStreamSynchronize(lane->copy);
        copy->api->cuStreamSynchronize(lane->kernel);
    }
    lane->num_ended++;
    return result == CU_SUCCESS ? 1 : -EIO;
}

static cu_result create_lane(struct flexkv_cuda_copy *copy, struct lane *lane, int priority, int num_buffers)
{
    uint32_t num_marks = num_buffers ? copy->at->num_spans + 1 : 0;

    if (TRY(cuStreamCreateWithPriority, &lane->kernel, CU_STREAM_NON_BLOCKING, priority) ||
        TRY(cuStreamCreateWithPriority, &lane->copy, CU_STREAM_NON_BLOCKING, priority))
        return copy->error;
    for (int i = 0; i < NUM_FENCES; i++)
        if (TRY(cuEventCreate, &lane->fences[i], CU_EVENT_DISABLE_TIMING))
            return copy->error;
    for (int i = 0; i < MAX_AHEAD; i++)
        if (TRY(cuEventCreate, &lane->ended[i], CU_EVENT_DISABLE_TIMING))
            return copy->error;
    for (uint32_t i = 0; i < num_marks; i++)
        if (TRY(cuEventCreate, &lane->marks[i], CU_EVENT_DISABLE_TIMING))
            return copy->error;
    for (int i = 0; i < num_buffers; i++)
        if (TRY(cuEventCreate, &lane->filled[i], CU_EVENT_DISABLE_TIMING) ||
            TRY(cuMemAlloc, &lane->buffers[i], copy->options.window_bytes))
            return copy->error;
    return CU_SUCCESS;
}

static cu_result create_all(struct flexkv_cuda_copy *copy)
{
    uint64_t bytes = copy->at->num_regions * sizeof(struct flexkv_region);
    struct lane *lane = &copy->lanes[FLEXKV_D2H];
    int least, greatest;

    if (TRY(cuCtxGetStreamPriorityRange, &least, &greatest) || create_lane(copy, lane, least, NUM_BUFFERS) ||
        create_lane(copy, &copy->lanes[FLEXKV_H2D], least, NUM_BUFFERS) ||
        (copy->at->moves[FLEXKV_P2D].count && create_lane(copy, &copy->lanes[FLEXKV_P2D], least, 0)) ||
        TRY(cuMemAlloc, &copy->regions, bytes) ||
        TRY(cuMemcpyAsync, copy->regions, (uint64_t)copy->at->regions, bytes, lane->copy) ||
        TRY(cuStreamSynchronize, lane->copy))
        return copy->error;
    return CU_SUCCESS;
}

int flexkv_cuda_copy_create(struct flexkv_cuda_copy **result, const struct flexkv_cuda *api,
                            const struct flexkv_cuda_options *options, const struct flexkv_pages *at, cu_result *error)
{
    struct flexkv_cuda_copy *copy = calloc(1, sizeof(*copy));

    if (!copy)
        return -ENOMEM;
    copy->api = api;
    copy->options = *options;
    copy->at = at;
    for (const struct flexkv_span *span = at->spans; span < at->spans + at->num_spans; span++)
        if (!span->peer_stride && copy->options.window_bytes < stride_of(span) && stride_of(span) <= MOST_FOR_A_BLOCK)
            copy->options.window_bytes = stride_of(span);
    for (int kind = FLEXKV_D2H; kind < FLEXKV_NUM_KINDS; kind++)
        if (!(copy->lanes[kind].marks = calloc(at->num_spans + 1, sizeof(cu_event)))) {
            while (--kind >= FLEXKV_D2H)
                free(copy->lanes[kind].marks);
            free(copy);
            return -ENOMEM;
        }
    pthread_mutex_init(&copy->pinning, NULL);
    copy->chunk_slots = REGISTER_BYTES > at->slot_bytes ? REGISTER_BYTES / at->slot_bytes : 1;
    copy->registering = 1;
    *error = api->cuCtxPushCurrent(options->context);
    if (!*error) {
        cu_context popped;

        *error = create_all(copy);
        api->cuCtxPopCurrent(&popped);
    }
    if (*error) {
        flexkv_cuda_copy_destroy(copy);
        return -EIO;
    }
    *result = copy;
    return 0;
}

/* Wait for the copies of memory that is not registered, of which no others start meanwhile: 1, or 0 if they last too long
 * for a thread that must notice the end of its rank. */
static int lock_to_pin(struct flexkv_cuda_copy *copy)
{
    struct timespec until = after(CLOCK_REALTIME, PIN_WAIT_MS);
    int rc;

    atomic_store(&copy->pin_waits, 1);
    rc = pthread_mutex_timedlock(&copy->pinning, &until);
    atomic_store(&copy->pin_waits, 0);
    return !rc;
}

int flexkv_cuda_copy_register(struct flexkv_cuda_copy *copy, uint64_t populated, int all, cu_result *error)
{
    const struct flexkv_pages *at = copy->at;
    uint64_t first = atomic_load(&copy->registered);
    uint64_t slots = populated > first && atomic_load(&copy->registering) ? populated - first : 0;
    cu_context popped;

    *error = CU_SUCCESS;
    slots = slots < copy->chunk_slots ? slots : copy->chunk_slots;
    if (slots < copy->chunk_slots && !all)
        return 0;
    if (!slots) {
        atomic_store(&copy->registering, 0);
        return 0;
    }
    *error = copy->api->cuCtxPushCurrent(copy->options.context);
    if (!*error && !lock_to_pin(copy)) {
        copy->api->cuCtxPopCurrent(&popped);
        return -EAGAIN;
    }
    if (!*error) {
        *error = copy->api->cuMemHostRegister(at->pool + first * at->slot_bytes, slots * at->slot_bytes,
                                              CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
        if (!*error)
            atomic_store(&copy->registered, first + slots);
        pthread_mutex_unlock(&copy->pinning);
        copy->api->cuCtxPopCurrent(&popped);
    }
    if (*error)
        atomic_store(&copy->registering, 0);
    return *error ? -EIO : 1;
}

int flexkv_cuda_copy_unregister(struct flexkv_cuda_copy *copy, uint64_t keep, cu_result *error)
{
    const struct flexkv_pages *at = copy->at;
    uint64_t registered = atomic_load(&copy->registered), first;
    cu_context popped;

    *error = CU_SUCCESS;
    if (atomic_load(&copy->is_stuck))
        return -EIO;
    if (registered <= keep)
        return 0;
    first = (registered - 1) / copy->chunk_slots * copy->chunk_slots;
    if (first < keep) {
        atomic_store(&copy->is_stuck, 1);
        return -EINVAL;
    }
    *error = copy->api->cuCtxPushCurrent(copy->options.context);
    if (!*error && !lock_to_pin(copy)) {
        copy->api->cuCtxPopCurrent(&popped);
        return -EAGAIN;
    }
    if (!*error) {
        atomic_store(&copy->registered, first);
        *error = copy->api->cuMemHostUnregister(at->pool + first * at->slot_bytes);
        if (*error)
            atomic_store(&copy->registered, registered);      /* for flexkv_cuda_copy_destroy */
        pthread_mutex_unlock(&copy->pinning);
        copy->api->cuCtxPopCurrent(&popped);
    }
    if (!*error)
        atomic_store(&copy->registering, 1);      /* also after a part that could not be pinned */
    if (*error)
        atomic_store(&copy->is_stuck, 1);
    return *error ? -EIO : 1;
}

uint64_t flexkv_cuda_copy_registered(const struct flexkv_cuda_copy *copy, int *more)
{
    *more = atomic_load(&copy->registering);
    return atomic_load(&copy->registered);
}

cu_result flexkv_cuda_copy_fence(struct flexkv_cuda_copy *copy, enum flexkv_kind kind, uint64_t fence, cu_stream stream)
{
    cu_result result = copy->api->cuCtxPushCurrent(copy->options.context);
    struct lane *lane = &copy->lanes[kind];
    uint64_t number = atomic_load(&lane->num_fences);
    cu_context popped;

    if (result)
        return result;
    result = copy->api->cuEventRecord(lane->fences[number % NUM_FENCES], stream);
    copy->api->cuCtxPopCurrent(&popped);
    if (!result) {
        atomic_store(&lane->fence_of[number % NUM_FENCES], fence);
        atomic_store(&lane->num_fences, number + 1);
    }
    return result;
}

cu_result flexkv_cuda_copy_error(struct flexkv_cuda_copy *copy, const char **function)
{
    *function = atomic_load(&copy->failed);
    return atomic_load(&copy->error);
}

void flexkv_cuda_copy_destroy(struct flexkv_cuda_copy *copy)
{
    const struct flexkv_cuda *api = copy->api;
    cu_context popped;
    int pushed = !api->cuCtxPushCurrent(copy->options.context);

    for (int kind = FLEXKV_D2H; kind < FLEXKV_NUM_KINDS; kind++) {
        struct lane *lane = &copy->lanes[kind];

        for (int i = 0; i < MAX_AHEAD; i++)
            if (lane->ended[i])
                api->cuEventDestroy(lane->ended[i]);
        for (uint32_t i = 0; i <= copy->at->num_spans; i++)
            if (lane->marks[i])
                api->cuEventDestroy(lane->marks[i]);
        free(lane->marks);
        for (int i = 0; i < NUM_BUFFERS; i++) {
            if (lane->filled[i])
                api->cuEventDestroy(lane->filled[i]);
            if (lane->buffers[i])
                api->cuMemFree(lane->buffers[i]);
        }
        for (int i = 0; i < NUM_FENCES; i++)
            if (lane->fences[i])
                api->cuEventDestroy(lane->fences[i]);
        if (lane->copy)
            api->cuStreamDestroy(lane->copy);
        if (lane->kernel)
            api->cuStreamDestroy(lane->kernel);
    }
    if (copy->regions)
        api->cuMemFree(copy->regions);
    for (uint64_t first = 0; first < atomic_load(&copy->registered); first += copy->chunk_slots)
        api->cuMemHostUnregister(copy->at->pool + first * copy->at->slot_bytes);
    if (pushed)
        api->cuCtxPopCurrent(&popped);
    pthread_mutex_destroy(&copy->pinning);
    free(copy);
}

struct flexkv_backend flexkv_cuda_backend(struct flexkv_cuda_copy *copy)
{
    return (struct flexkv_backend){ attach, start, mark, poll_window, reached, copy };
}
