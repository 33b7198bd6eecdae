/* A CUDA driver without a GPU: device memory is ordinary memory, every stream is a thread that works through what it was
 * given, events and waits order streams as the real ones do, the kernels are emulated. Calls can be made to fail, and
 * work to take long. Built as libcuda.so.1 and found where the real one would be. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "cuda_api.h"

#define MAX_BLOCKS 480

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

struct cu_event_s { uint64_t asked, reached; };

struct work {
    struct work *next;
    enum { COPY, ROWS, MOVE, CHECKSUM, RECORD, WAIT } what;
    cu_event event;
    uint64_t count;               /* of the event */
    struct cu_memcpy2d rows;
    const uint64_t *regions;      /* four words each, as in struct flexkv_region; CHECKSUM: where sums go */
    uint32_t num_regions, num_blocks;
    uint64_t far, far_stride;
    int use_slots, gather;
    int32_t pages[MAX_BLOCKS], slots[MAX_BLOCKS];
};

struct cu_stream_s {
    pthread_t thread;
    struct work *first, **last;
    int busy, end;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char failing[64];
static int fail_after, fail_code;
static long delay_us, registering_us, live_objects, live_bytes, registered_bytes, calls;
static long registrations_allowed = -1;
static int num_devices = 1, has_access = 1, has_nvlink = 1;
#define MAX_DEVICES 8
static char contexts[MAX_DEVICES];
#define MAX_DEPTH 32
static __thread int depth, current[MAX_DEPTH];        /* devices of the contexts that were pushed */

/* ---- what tests call ---- */

void fake_cuda_fail(const char *name, int after, int code)
{
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof(failing), "%s", name);
    fail_after = after;
    fail_code = code;
    calls = 0;
    pthread_mutex_unlock(&lock);
}

void fake_cuda_delay(long microseconds) { __atomic_store_n(&delay_us, microseconds, __ATOMIC_SEQ_CST); }

/* Set the number of GPUs; whether they can access one another's memory, and over NVLink. */
void fake_cuda_plan_devices(int count, int access, int nvlink)
{
    num_devices = count;
    has_access = access;
    has_nvlink = nvlink;
}

/* So many more parts can be registered, the next one waits; -1: all. */
void fake_cuda_allow_registering(long number)
{
    pthread_mutex_lock(&lock);
    registrations_allowed = number;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void fake_cuda_delay_registering(long microseconds) { registering_us = microseconds; }
long fake_cuda_objects(void) { return live_objects; }
long fake_cuda_bytes(void) { return live_bytes; }
long fake_cuda_registered(void) { return registered_bytes; }
long fake_cuda_calls(void) { return calls; }

static int enter(const char *name)
{
    int code = 0;

    pthread_mutex_lock(&lock);
    if (!strcmp(failing, name)) {
        calls++;
        if (fail_code && fail_after-- == 0)
            code = fail_code;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

#define ENTER do { int code_ = enter(__func__ + 5); if (code_) return code_; } while (0)
#define NEEDS_CONTEXT do { if (!depth) return 201; } while (0)

static void count(long objects, long bytes)
{
    pthread_mutex_lock(&lock);
    live_objects += objects;
    live_bytes += bytes;
    pthread_mutex_unlock(&lock);
}

/* ---- work ---- */

static void move_blocks(const struct work *work)
{
    for (uint32_t i = 0; i < work->num_blocks; i++)
        for (uint32_t r = 0; r < work->num_regions; r++) {
            const uint64_t *region = work->regions + 4 * r;
            char *page = (char *)(region[0] + (uint64_t)((int64_t)work->pages[i] * (int64_t)region[1]));
            uint64_t index = work->use_slots ? (uint64_t)work->slots[i] : i;
            char *other = (char *)(work->far + index * work->far_stride + region[3]);

            memcpy(work->gather ? other : page, work->gather ? page : other, region[2]);
        }
}

static void checksum_slots(const struct work *work)
{
    for (uint32_t i = 0; i < work->num_blocks; i++)
        ((uint64_t *)work->regions)[i] = XXH3_64bits((char *)work->far + i * work->far_stride, work->far_stride);
}

static void do_work(const struct work *work)
{
    const struct cu_memcpy2d *rows = &work->rows;

    if (work->what == MOVE)
        move_blocks(work);
    else if (work->what == CHECKSUM)
        checksum_slots(work);
    else
        for (size_t y = 0; y < rows->height; y++)
            memmove((char *)rows->dst_device + y * rows->dst_pitch, (char *)rows->src_device + y * rows->src_pitch,
                    rows->width);
}

static void *stream_thread(void *argument)
{
    cu_stream stream = argument;

    pthread_mutex_lock(&lock);
    for (;;) {
        struct work *work = stream->first;

        if (!work || (work->what == WAIT && work->event->reached < work->count)) {
            if (stream->end && !work)
                break;
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        stream->busy = 1;
        stream->first = work->next;
        if (!stream->first)
            stream->last = &stream->first;
        if (work->what == RECORD) {
            work->event->reached = work->count;
        } else if (work->what != WAIT) {
            long pause = __atomic_load_n(&delay_us, __ATOMIC_SEQ_CST);
            struct timespec time = { pause / 1000000, pause % 1000000 * 1000 };

            pthread_mutex_unlock(&lock);
            if (pause)
                nanosleep(&time, NULL);
            do_work(work);
            pthread_mutex_lock(&lock);
        }
        stream->busy = 0;
        free(work);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void give(cu_stream stream, struct work *work)
{
    struct work *copy = malloc(sizeof(*copy));

    *copy = *work;
    copy->next = NULL;
    *stream->last = copy;
    stream->last = &copy->next;
    pthread_cond_broadcast(&changed);
}

static void give_locked(cu_stream stream, struct work *work)
{
    pthread_mutex_lock(&lock);
    give(stream, work);
    pthread_mutex_unlock(&lock);
}

/* ---- the driver ---- */

static cu_result fake_cuInit(unsigned int flags) { (void)flags; return 0; }

static cu_result fake_cuGetErrorName(cu_result error, const char **name)
{
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
    return 0;
}

static cu_result fake_cuGetErrorString(cu_result error, const char **text)
{
    (void)error;
    *text = "a failure that a test asked for";
    return 0;
}

static cu_result fake_cuDriverGetVersion(int *version) { ENTER; *version = 13000; return 0; }
static cu_result fake_cuDeviceGet(cu_device *device, int ordinal)
{
    ENTER;
    *device = ordinal;
    return ordinal < num_devices ? 0 : 101;
}

static cu_result fake_cuDeviceGetCount(int *number) { ENTER; *number = num_devices; return 0; }

static cu_result fake_cuDeviceGetUuid(struct cu_uuid *uuid, cu_device device)
{
    ENTER;
    memcpy(uuid->bytes, "a fake GPU's id.", 16);
    uuid->bytes[0] += (unsigned char)device;
    return 0;
}

static cu_result fake_cuDeviceGetAttribute(int *value, int attribute, cu_device device)
{
    ENTER;
    (void)device;
    *value = attribute == 75 ? 9 : 0;
    return 0;
}

static cu_result fake_cuDeviceGetP2PAttribute(int *value, int attribute, cu_device from, cu_device to)
{
    ENTER;
    if (from == to || (attribute != CU_P2P_ACCESS_SUPPORTED && attribute != CU_P2P_NATIVE_ATOMIC_SUPPORTED))
        return INVALID_VALUE;
    *value = attribute == CU_P2P_ACCESS_SUPPORTED ? has_access : has_access && has_nvlink;
    return 0;
}

static cu_result fake_cuDevicePrimaryCtxRetain(cu_context *context, cu_device device)
{
    ENTER;
    *context = (cu_context)(contexts + device);
    return 0;
}

static cu_result fake_cuCtxPushCurrent(cu_context context)
{
    ENTER;
    if (depth == MAX_DEPTH)
        return INVALID_VALUE;
    current[depth++] = (int)((char *)context - contexts);
    return 0;
}

static cu_result fake_cuCtxPopCurrent(cu_context *context)
{
    NEEDS_CONTEXT;
    *context = (cu_context)(contexts + current[--depth]);
    return 0;
}

static cu_result fake_cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER;
    *least = 0;
    *greatest = -5;
    return 0;
}

static cu_result fake_cuModuleLoadData(cu_module *module, const void *image)
{
    ENTER;
    *module = (cu_module)image;
    return memcmp(image, "\177ELF", 4) ? 200 : 0;
}

static cu_result fake_cuModuleGetFunction(cu_function *function, cu_module module, const char *name)
{
    ENTER;
    (void)module;
    *function = (cu_function)(strcmp(name, "flexkv_checksum_slots") ? move_blocks : checksum_slots);
    return strcmp(name, "flexkv_move_blocks") && strcmp(name, "flexkv_checksum_slots") ? NOT_FOUND : 0;
}

#include "memory.h"

#define MAX_PARTS 256
static struct { void *ptr; size_t bytes; } parts[MAX_PARTS];

static cu_result fake_cuMemHostRegister(void *ptr, size_t bytes, unsigned int flags)
{
    struct timespec time = { registering_us / 1000000, registering_us % 1000000 * 1000 };

    ENTER;
    NEEDS_CONTEXT;
    (void)flags;
    nanosleep(&time, NULL);
    pthread_mutex_lock(&lock);
    while (!registrations_allowed)
        pthread_cond_wait(&changed, &lock);
    registrations_allowed -= registrations_allowed > 0;
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < MAX_PARTS; i++)
        if (!parts[i].ptr) {
            parts[i].ptr = ptr;
            parts[i].bytes = bytes;
            count(1, 0);
            registered_bytes += (long)bytes;
            return 0;
        }
    return OUT_OF_MEMORY;
}

/* Address and size of a registered part; 0 if there is none of that number. */
size_t fake_cuda_part(int number, size_t *bytes)
{
    *bytes = parts[number].bytes;
    return (size_t)parts[number].ptr;
}

static cu_result fake_cuMemHostUnregister(void *ptr)
{
    ENTER;
    NEEDS_CONTEXT;
    for (int i = 0; i < MAX_PARTS; i++)
        if (parts[i].ptr == ptr) {
            parts[i].ptr = NULL;
            registered_bytes -= (long)parts[i].bytes;
            count(-1, 0);
            return 0;
        }
    return INVALID_VALUE;
}

/* As the real driver: a copy may not cross from one registered part into another. */
static int crosses(uint64_t address, uint64_t bytes)
{
    for (int i = 0; i < MAX_PARTS; i++) {
        uint64_t start = (uint64_t)parts[i].ptr, end = start + parts[i].bytes;

        if (start && address < end && address + bytes > start && (address < start || address + bytes > end))
            return 1;
    }
    return 0;
}

static cu_result fake_cuStreamCreateWithPriority(cu_stream *stream, unsigned int flags, int priority)
{
    ENTER;
    NEEDS_CONTEXT;
    (void)flags;
    (void)priority;
    *stream = calloc(1, sizeof(**stream));
    (*stream)->last = &(*stream)->first;
    pthread_create(&(*stream)->thread, NULL, stream_thread, *stream);
    count(1, 0);
    return 0;
}

static cu_result fake_cuStreamDestroy(cu_stream stream)
{
    NEEDS_CONTEXT;
    pthread_mutex_lock(&lock);
    stream->end = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(stream->thread, NULL);
    free(stream);
    count(-1, 0);
    return 0;
}

static cu_result fake_cuStreamSynchronize(cu_stream stream)
{
    ENTER;
    NEEDS_CONTEXT;
    pthread_mutex_lock(&lock);
    while (stream->first || stream->busy)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return 0;
}

static cu_result fake_cuEventCreate(cu_event *event, unsigned int flags)
{
    ENTER;
    NEEDS_CONTEXT;
    (void)flags;
    *event = calloc(1, sizeof(**event));
    count(1, 0);
    return 0;
}

static cu_result fake_cuEventDestroy(cu_event event)
{
    NEEDS_CONTEXT;
    free(event);
    count(-1, 0);
    return 0;
}

static cu_result fake_cuStreamWaitEvent(cu_stream stream, cu_event event, unsigned int flags)
{
    struct work work = { .what = WAIT, .event = event };

    ENTER;
    NEEDS_CONTEXT;
    (void)flags;
    pthread_mutex_lock(&lock);
    work.count = event->asked;
    give(stream, &work);
    pthread_mutex_unlock(&lock);
    return 0;
}

static cu_result fake_cuEventRecord(cu_event event, cu_stream stream)
{
    struct work work = { .what = RECORD, .event = event };

    ENTER;
    NEEDS_CONTEXT;
    pthread_mutex_lock(&lock);
    work.count = ++event->asked;
    give(stream, &work);
    pthread_mutex_unlock(&lock);
    return 0;
}

static cu_result fake_cuEventQuery(cu_event event)
{
    int reached;

    ENTER;
    NEEDS_CONTEXT;
    pthread_mutex_lock(&lock);
    reached = event->reached == event->asked;
    pthread_mutex_unlock(&lock);
    return reached ? 0 : CU_ERROR_NOT_READY;
}

static cu_result copy_later(cu_ptr dst, cu_ptr src, size_t bytes, cu_stream stream)
{
    struct work work = { .what = COPY, .rows = { .src_device = src, .dst_device = dst, .width = bytes, .height = 1 } };

    if (crosses(src, bytes) || crosses(dst, bytes))
        return INVALID_VALUE;
    give_locked(stream, &work);
    return 0;
}

static cu_result fake_cuMemcpyAsync(cu_ptr dst, cu_ptr src, size_t bytes, cu_stream stream)
{
    ENTER;
    NEEDS_CONTEXT;
    return copy_later(dst, src, bytes, stream);
}

static cu_result fake_cuMemcpy2DAsync(const struct cu_memcpy2d *rows, cu_stream stream)
{
    struct work work = { .what = ROWS, .rows = *rows };

    ENTER;
    NEEDS_CONTEXT;
    if (rows->src_type != CU_MEMORYTYPE_UNIFIED || rows->dst_type != CU_MEMORYTYPE_UNIFIED ||
        rows->width > rows->src_pitch || rows->width > rows->dst_pitch)
        return INVALID_VALUE;
    give_locked(stream, &work);
    return 0;
}

static cu_result fake_cuMemcpyBatchAsync(cu_ptr *dsts, cu_ptr *srcs, size_t *sizes, size_t n,
                                         struct cu_memcpy_attributes *attributes, size_t *attribute_of,
                                         size_t num_attributes, size_t *failed, cu_stream stream)
{
    ENTER;
    NEEDS_CONTEXT;
    *failed = SIZE_MAX;
    if (num_attributes != 1 || attribute_of[0] || attributes->src_access_order != 1)
        return INVALID_VALUE;
    for (size_t i = 0; i < n; i++)
        if (copy_later(dsts[i], srcs[i], sizes[i], stream))
            return INVALID_VALUE;
    return 0;
}

static cu_result fake_cuLaunchKernel(cu_function function, unsigned int gx, unsigned int gy, unsigned int gz,
                                     unsigned int bx, unsigned int by, unsigned int bz, unsigned int shared_bytes,
                                     cu_stream stream, void **parameters, void **extra)
{
    struct work work = { .what = MOVE };
    const int32_t *ids;

    ENTER;
    NEEDS_CONTEXT;
    (void)shared_bytes;
    if (extra || !gx || gy != 1 || gz != 1 || !bx || by != 1 || bz != 1)
        return INVALID_VALUE;
    if (function == (cu_function)checksum_slots) {
        work.what = CHECKSUM;
        work.num_blocks = gx;
        work.far = *(uint64_t *)parameters[0];
        work.far_stride = *(uint64_t *)parameters[1];
        work.regions = *(const uint64_t **)parameters[2];
        give_locked(stream, &work);
        return bx == 512 ? 0 : INVALID_VALUE;
    }
    if (function != (cu_function)move_blocks)
        return INVALID_VALUE;
    ids = parameters[9];
    work.regions = *(const uint64_t **)parameters[0];
    work.num_regions = *(uint32_t *)parameters[1];
    work.num_blocks = *(uint32_t *)parameters[2];
    work.far = *(uint64_t *)parameters[5];
    work.far_stride = *(uint64_t *)parameters[6];
    work.use_slots = *(int *)parameters[7];
    work.gather = *(int *)parameters[8];
    if (work.num_blocks > MAX_BLOCKS)
        return INVALID_VALUE;
    memcpy(work.pages, ids, work.num_blocks * sizeof(int32_t));
    memcpy(work.slots, ids + MAX_BLOCKS, work.num_blocks * sizeof(int32_t));
    give_locked(stream, &work);
    return 0;
}

cu_result cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, int *status)
{
    static const struct { const char *name; void *address; } functions[] = {
        { "cuInit", fake_cuInit },
        { "cuGetProcAddress", cuGetProcAddress_v2 },
        { "cuMemCreate", fake_cuMemCreate },           /* these two for tests alone */
        { "cuMemGetAllocationGranularity", fake_cuMemGetAllocationGranularity },
#define FAKE(name, arguments) { #name, fake_##name },
        FLEXKV_CUDA_FUNCTIONS(FAKE)
        FLEXKV_CUDA_OPTIONAL(FAKE)
    };

    (void)version;
    (void)flags;
    *address = NULL;
    if (status)
        *status = 0;
    if (enter("cuGetProcAddress") || (fail_code == NOT_FOUND && !strcmp(failing, name)))
        return NOT_FOUND;
    for (size_t i = 0; i < sizeof(functions) / sizeof(*functions); i++)
        if (!strcmp(functions[i].name, name)) {
            *address = functions[i].address;
            return 0;
        }
    if (status)
        *status = 1;
    return NOT_FOUND;
}

cu_result cuGetProcAddress(const char *name, void **address, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, address, version, flags, NULL);
}
