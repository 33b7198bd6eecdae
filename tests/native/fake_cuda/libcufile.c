/* cuFile without a GPU: device memory is ordinary memory (libcuda.c), and a batch is done when its status is asked for.
 * Built as libcufile.so.0 and found where the real one would be. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

typedef struct { int err, cu_err; } result;
typedef struct { int type; union { int fd; void *handle; } handle; const void *fs_ops; } descriptor;
typedef struct {
    int mode;
    union { struct { uintptr_t base; int64_t file_offset, offset; size_t size; } batch; } u;
    intptr_t handle;
    int opcode;
    uint64_t cookie;
} params;
typedef struct { uint64_t cookie; int status; size_t ret; } event;

enum { COMPLETE = 0x10, FAILED = 0x40, INTERNAL_ERROR = 5030, NOT_REGISTERED = 5027, INVALID_FLAG = 5019, MAX = 64 };

typedef struct { params asked[MAX]; unsigned count; } pieces;

static unsigned under_way;                                    /* of all batches; the real one hangs if it is over MAX */
static int refuse_files, break_batches, fail_count, registered;
static long delay_us, num_moves;

/* What a test can do: files are refused; the next batch fails as a whole; so many pieces fail; each takes so long. */
void fake_cufile_plan(int refuse, int broken, int pieces, long microseconds)
{
    refuse_files = refuse;
    break_batches = broken;
    fail_count = pieces;
    delay_us = microseconds;
}

/* Pieces read or written; handles and buffers that were not given back. */
long fake_cufile_moves(void) { return num_moves; }
long fake_cufile_registered(void) { return registered; }

static result done(int err) { return (result){ .err = err }; }

result cuFileDriverOpen(void) { return done(0); }
result cuFileDriverOpen_v2(void) { return done(0); }

result cuFileHandleRegister(void **handle, const descriptor *file)
{
    int flags = fcntl(file->handle.fd, F_GETFL);

    if (flags < 0 || flags & O_NOFOLLOW)
        return done(INVALID_FLAG);
    if (refuse_files || file->fs_ops)
        return done(NOT_REGISTERED);
    registered++;
    *handle = (void *)(INTPTR_MIN + file->handle.fd + 1);     /* the real ones have any bits, too */
    return done(0);
}

void cuFileHandleDeregister(void *handle) { registered -= handle != NULL; }

result cuFileBufRegister(const void *buffer, size_t size, int flags)
{
    registered++;
    return done(buffer && size && !flags ? 0 : INTERNAL_ERROR);
}

result cuFileBufDeregister(const void *buffer)
{
    registered -= buffer != NULL;
    return done(0);
}

result cuFileBatchIOSetUp(void **id, unsigned count)
{
    *id = calloc(1, sizeof(pieces));
    return done(*id && count <= MAX ? 0 : INTERNAL_ERROR);
}

void cuFileBatchIODestroy(void *id)
{
    if (((pieces *)id)->count)
        abort();                                              /* what is under way still writes to memory */
    free(id);
}

result cuFileBatchIOSubmit(void *id, unsigned count, params *asked, unsigned flags)
{
    pieces *batch = id;

    if (under_way + count > MAX || flags || batch->count || break_batches)
        return done(INTERNAL_ERROR);
    memcpy(batch->asked, asked, count * sizeof(*asked));
    batch->count = count;
    under_way += count;
    return done(0);
}

/* By way of memory that O_DIRECT can use. */
static ssize_t move(const params *p, char *memory)
{
    size_t size = p->u.batch.size;
    int fd = (int)(p->handle - INTPTR_MIN) - 1;
    void *aligned = NULL;
    ssize_t got;

    if (fail_count > 0) {
        fail_count--;
        return -EIO;
    }
    if (posix_memalign(&aligned, 4096, size))
        return -ENOMEM;
    memcpy(aligned, memory, size);
    got = p->opcode ? pwrite(fd, aligned, size, p->u.batch.file_offset)
                    : pread(fd, aligned, size, p->u.batch.file_offset);
    if (!p->opcode && got > 0)
        memcpy(memory, aligned, (size_t)got);
    free(aligned);
    return got < 0 ? -errno : got;
}

/* A few at a time, the last first: nobody may count on their order. */
result cuFileBatchIOGetStatus(void *id, unsigned at_least, unsigned *count, event *events, struct timespec *timeout)
{
    unsigned most = *count < 3 ? *count : 3;
    pieces *batch = id;

    (void)at_least, (void)timeout;
    for (*count = 0; *count < most && batch->count; ++*count, under_way--) {
        const params *p = &batch->asked[--batch->count];
        char *memory = (char *)p->u.batch.base + p->u.batch.offset;
        ssize_t got;

        usleep((useconds_t)delay_us);
        got = move(p, memory);
        num_moves++;
        events[*count] = (event){ .cookie = p->cookie, .status = got < 0 ? FAILED : COMPLETE, .ret = (size_t)got };
    }
    return done(0);
}
