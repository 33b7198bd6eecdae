/* Pieces, and jobs: a job is one I/O of neighbouring pieces. Private to the queue. */
#ifndef FLEXKV_IO_JOB_H
#define FLEXKV_IO_JOB_H

#include "io_method.h"

struct piece {
    struct piece *next;
    uint64_t tag;
    uint64_t file_offset;
    uint64_t memory_offset;
    uint64_t size;
    uint64_t checksum;
    uint32_t file;
    uint8_t kind;                 /* enum flexkv_io_kind */
    uint8_t alone;                /* a merged I/O with this piece has failed: do not merge it again */
};

struct pieces {
    struct piece *first;
    struct piece **last;
};

/* An I/O and its pieces, by offset in the file. */
struct job {
    struct flexkv_io io;          /* of the bytes not moved yet; must be the first member: its address is the job's */
    struct job *next, **at;       /* of the list that holds the job; `at` points to the pointer to it */
    struct pieces pieces;
    uint32_t num_pieces;
    uint64_t offset;              /* of the first piece */
    uint64_t covered;             /* bytes from `offset` on that have been moved */
    uint64_t deadline_ns;
    int64_t error;                /* negative errno of the bytes that are not covered */
    int is_stuck;
    struct iovec vectors[];
};

struct jobs {
    struct job *first;
    struct job **last;
};

static inline void clear_pieces(struct pieces *pieces)
{
    pieces->first = NULL;
    pieces->last = &pieces->first;
}

static inline void append_piece(struct pieces *pieces, struct piece *piece)
{
    piece->next = NULL;
    *pieces->last = piece;
    pieces->last = &piece->next;
}

static inline struct piece *pop_piece(struct pieces *pieces)
{
    struct piece *piece = pieces->first;

    if (piece && !(pieces->first = piece->next))
        pieces->last = &pieces->first;
    return piece;
}

static inline void clear_jobs(struct jobs *jobs)
{
    jobs->first = NULL;
    jobs->last = &jobs->first;
}

static inline void append_job(struct jobs *jobs, struct job *job)
{
    job->next = NULL;
    job->at = jobs->last;
    *jobs->last = job;
    jobs->last = &job->next;
}

static inline void remove_job(struct jobs *jobs, struct job *job)
{
    *job->at = job->next;
    if (job->next)
        job->next->at = job->at;
    else
        jobs->last = job->at;
}

static inline struct job *pop_job(struct jobs *jobs)
{
    struct job *job = jobs->first;

    if (job)
        remove_job(jobs, job);
    return job;
}

/* Remove the first piece of `waiting` and the neighbours behind it, and make one job of them. NULL: no memory. */
struct job *flexkv_io_form(struct pieces *waiting, uint8_t *memory);

/* Continue the I/O of a job at `offset`, which must not be lower than the current one. */
void flexkv_io_advance(struct job *job, uint64_t offset);

#endif
