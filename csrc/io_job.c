#include "io_job.h"

#include <stdlib.h>

#define MERGED_BYTES (1u << 20)   /* neighbours become one I/O up to this size */
#define MAX_VECTORS 256u          /* of an I/O; the kernel takes 1024 */

/* Whether `next` can be merged behind `piece` into an I/O that has `bytes` bytes and `num_vectors` vectors. */
static int follows(const struct piece *piece, const struct piece *next, uint64_t bytes, uint32_t num_vectors)
{
    return next && !piece->alone && !next->alone && next->file_offset == piece->file_offset + piece->size &&
           bytes + next->size <= MERGED_BYTES && num_vectors < MAX_VECTORS;
}

static int adjacent(const struct piece *piece, const struct piece *next)
{
    return next->memory_offset == piece->memory_offset + piece->size;
}

struct job *flexkv_io_form(struct pieces *waiting, uint8_t *memory)
{
    struct piece *piece = waiting->first;
    uint32_t num_vectors = 1, num_pieces = 1;
    uint64_t bytes = piece->size;
    struct iovec *vector;
    struct job *job;

    for (; follows(piece, piece->next, bytes, num_vectors); piece = piece->next, num_pieces++) {
        num_vectors += !adjacent(piece, piece->next);
        bytes += piece->next->size;
    }
    job = calloc(1, sizeof(*job) + num_vectors * sizeof(struct iovec));
    if (!job)
        return NULL;
    job->io.kind = waiting->first->kind;
    job->io.file = waiting->first->file;
    job->io.offset = job->offset = waiting->first->file_offset;
    job->io.vectors = vector = job->vectors;
    job->io.num_vectors = num_vectors;
    job->num_pieces = num_pieces;
    clear_pieces(&job->pieces);
    for (uint32_t i = 0; i < num_pieces; i++) {
        struct piece *before = piece;

        piece = pop_piece(waiting);
        if (i && adjacent(before, piece))
            vector->iov_len += piece->size;
        else
            *(vector += i > 0) = (struct iovec){ memory + piece->memory_offset, piece->size };
        append_piece(&job->pieces, piece);
    }
    return job;
}

void flexkv_io_advance(struct job *job, uint64_t offset)
{
    uint64_t bytes = offset - job->io.offset;

    job->io.offset = offset;
    while (bytes >= job->io.vectors->iov_len) {
        bytes -= job->io.vectors->iov_len;
        job->io.vectors++;
        job->io.num_vectors--;
    }
    job->io.vectors->iov_base = (uint8_t *)job->io.vectors->iov_base + bytes;
    job->io.vectors->iov_len -= bytes;
}
