/* Twin of a method, for tests: I/Os of it fail, come short or hang, on demand. */
#ifndef FLEXKV_IO_FAULTY_H
#define FLEXKV_IO_FAULTY_H

#include "io_method.h"

enum flexkv_io_fault {
    FLEXKV_IO_FAILS,              /* ends with the negative errno `amount`, and moves nothing */
    FLEXKV_IO_SHORT,              /* really moves only the first `amount` bytes */
    FLEXKV_IO_HANGS,              /* starts, and touches memory, only when released, or after `amount` ms if not negative */
};

struct flexkv_io_faults;

int flexkv_io_faults_create(struct flexkv_io_faults **result, const struct flexkv_io_method *inner);

/* The next `count` I/Os of this kind and file (-1: any) have the fault. -ENOSPC: too many are planned. */
int flexkv_io_faults_plan(struct flexkv_io_faults *faults, enum flexkv_io_kind kind, int32_t file,
                          enum flexkv_io_fault fault, int64_t amount, uint32_t count);

/* What hangs goes on. */
void flexkv_io_faults_release(struct flexkv_io_faults *faults);

/* Faults that were planned and have not happened. */
uint32_t flexkv_io_faults_left(struct flexkv_io_faults *faults);

/* After the queue was closed. */
void flexkv_io_faults_free(struct flexkv_io_faults *faults);

/* The twin: for one queue at a time. */
const struct flexkv_io_method *flexkv_io_faults_method(const struct flexkv_io_faults *faults);

#endif
