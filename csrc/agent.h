/* Device agent: a thread in the process that owns the engine's pages. It alone copies between pages and host slots.
 *
 * It takes ops from one ring and answers on another; it ends when the socket to the controller hangs up, when a ring
 * is corrupt, or when it is stopped. In each of these cases, every op that it took has a result in its own process. */
#ifndef FLEXKV_AGENT_H
#define FLEXKV_AGENT_H

#include <stddef.h>
#include <stdint.h>

enum flexkv_kind { FLEXKV_D2H = 1, FLEXKV_H2D = 2, FLEXKV_P2D = 3, FLEXKV_NUM_KINDS };   /* P2D: from the pages of peers */

/* Records of the rings. */
enum { FLEXKV_MSG_OP = 1, FLEXKV_MSG_CANCEL = 2, FLEXKV_MSG_RESULT = 3 };

/* Numbers beside the records. The controller's: number of populated slots, whether it is final, whether the exchange is
 * over because a peer has left, and how often the number of slots was lowered, plus 1 (0: it is never lowered). The
 * agent's: number of slots that it can copy from and to, the fences of the steps that the device has done, whether it can
 * copy from the pages of its peers, the last of the controller's lowerings that it has followed, and whether its owner
 * takes part: before, no op may be sent. */
enum { FLEXKV_NOTE_POPULATED, FLEXKV_NOTE_ALL_POPULATED, FLEXKV_NOTE_EXCHANGE_OVER, FLEXKV_NOTE_LOWERED };
enum { FLEXKV_NOTE_USABLE, FLEXKV_NOTE_LOAD_FENCE, FLEXKV_NOTE_SAVE_FENCE, FLEXKV_NOTE_EXCHANGE, FLEXKV_NOTE_FOLLOWED,
       FLEXKV_NOTE_TAKES_PART };

enum flexkv_op_flag {
    FLEXKV_OP_CANCELLED = 1,      /* do not copy, only report */
    FLEXKV_OP_LAYERWISE = 2,      /* a load, layer after layer; a save ignores it */
    FLEXKV_OP_MORE = 4,           /* not the last part of the op */
    FLEXKV_OP_SHARE = 8,          /* a load of the rank's part of each copy; a P2D of the same blocks follows, whose
                                   * outcome is that of the load */
};

enum { FLEXKV_FAREWELL = 'F' };   /* the only byte sent on the socket: the agent ends and accesses no slot any more */
enum { FLEXKV_IN_PLACE = -2 };    /* instead of a slot: the block was moved by another op, and is only reported */

struct flexkv_msg_op {            /* then int32 slots[count], int32 pages[groups][count]; page -1: none in this group */
    uint64_t op_id;
    uint64_t task_id;
    uint64_t fence;
    uint32_t kind;
    uint32_t count;
    uint32_t op_blocks;           /* blocks of the whole op, of which this may be a part */
    uint32_t flags;               /* enum flexkv_op_flag */
    uint32_t counter;             /* of a layerwise load: the row of eventfds that signal its layers, from 1; 0: none */
    uint32_t groups;              /* layer groups; as many as the rank has */
};

struct flexkv_msg_cancel {
    uint64_t op_id;
};

struct flexkv_msg_result {        /* then uint8 ok[count] */
    uint64_t op_id;
    uint32_t first;               /* results are for blocks [first, first + count) of the op */
    uint32_t count;
    uint32_t last;                /* the agent will not touch the op's slots or pages again */
    uint32_t pad;
};

struct flexkv_region {            /* as REGION_DTYPE */
    uint64_t base;
    int64_t page_stride;
    uint64_t chunk_bytes;
    uint64_t slot_offset;         /* from the start of the slot; of a P2D: address of the bytes in page 0 of a peer */
};

/* Regions of one layer group: adjacent in a slot, or, of a P2D, in any order. A span without regions moves nothing. */
struct flexkv_span {              /* as SPAN_DTYPE */
    uint32_t first;
    uint32_t num_regions;
    uint64_t slot_offset;         /* from the start of the slot */
    uint64_t bytes;
    uint64_t max_chunk;
    uint64_t group;
    uint64_t peer_stride;         /* of a P2D: distance of two pages of the peer */
};

struct flexkv_spans {             /* consecutive spans; an op moves them in their order */
    uint32_t first;
    uint32_t count;
};

struct flexkv_pages {             /* the memory that a backend copies between */
    uint8_t *pool;
    uint64_t slot_bytes;
    uint64_t num_slots;
    const struct flexkv_region *regions;
    uint32_t num_regions;
    const struct flexkv_span *spans;
    uint32_t num_spans;
    struct flexkv_spans moves[FLEXKV_NUM_KINDS]; /* by kind: those that a save writes (perhaps none), a load reads */
    struct flexkv_spans layers;   /* of a layerwise load; those of a load if it cannot be divided */
    struct flexkv_spans shares;   /* of a load with FLEXKV_OP_SHARE; none, as those of P2D, if there are no peers */
    const uint64_t *num_pages;    /* by layer group */
    uint32_t num_groups;
    uint64_t block_bytes;         /* that a load of a block moves */
};

/* Moves blocks. Calls come from the agent's thread alone, except where said otherwise. Windows of one kind end in the
 * order in which they started. */
struct flexkv_backend {
    int (*attach)(void *context); /* first call on the thread: 0, or negative errno; may be NULL */
    /* Start to move a span of the first blocks of an op with this fence, at most `count`. Slots and pages must be in
     * range; the pages are those of the span's layer group. Returns the number of blocks; 0: no room now, call again
     * when a window has ended; or negative errno: none of these blocks is under way. */
    int (*start)(void *context, const struct flexkv_pages *at, enum flexkv_kind kind, uint64_t fence, uint32_t span,
                 const int32_t *slots, const int32_t *pages, uint32_t count);
    /* Mark the loads of the span that were started until now: flexkv_agent_wait_span returns for them. May be NULL. */
    int (*mark)(void *context, uint32_t span);
    /* State of the oldest window of the kind: 1 when it has arrived, 0 while under way, negative errno when it has
     * failed. If not 0, it has ended: none of its copies accesses slots or pages any more. */
    int (*poll)(void *context, enum flexkv_kind kind);
    /* The highest fence of the kind whose compute the device has done, given that it was advanced to `advanced`. NULL:
     * compute is done before its fence is advanced. */
    uint64_t (*reached)(void *context, enum flexkv_kind kind, uint64_t advanced);
    void *context;
};

extern const struct flexkv_backend flexkv_host_backend; /* the CPU is the device: memcpy */

struct flexkv_agent_options {
    struct flexkv_pages at;
    struct flexkv_backend backend;
    void *submissions;            /* ring of ops, from the controller */
    void *completions;            /* ring of results, to the controller */
    uint64_t ring_bytes;          /* of each */
    int submission_event_fd;
    int completion_event_fd;
    int socket_fd;                /* watched for hang-up; FLEXKV_FAREWELL is sent on it */
    int keep_outcomes;            /* for flexkv_agent_take; 0: it will not be called */
    uint32_t rest_timeout_ms;     /* for windows that are under way when the agent ends */
};

struct flexkv_outcome {           /* of an op, for the process that owns the pages; free() it */
    struct flexkv_outcome *next;
    uint64_t task_id;
    uint32_t kind;
    uint32_t count;
    uint32_t op_blocks;
    uint32_t groups;
    const int32_t *pages;         /* [groups][count]: of the blocks of `ok` */
    const uint8_t *ok;
};

struct flexkv_signals {           /* how the layers of a load are signalled */
    const int *fds;               /* eventfds, [counter][layer] */
    const uint32_t *span_of;      /* by layer: the span with its last byte */
    uint32_t num_counters;
    uint32_t num_layers;
};

struct flexkv_agent;

/* Start the thread. The caller owns the memory and descriptors in the options; they must outlive flexkv_agent_stop. */
int flexkv_agent_start(struct flexkv_agent **agent, const struct flexkv_agent_options *options);

/* Let ops start whose fence is at most the one of their kind. Fences must not decrease. */
void flexkv_agent_advance(struct flexkv_agent *agent, uint64_t load_fence, uint64_t save_fence);

/* Number of slots that the controller has populated, at most all of the pool; *all: it is final. Any thread. */
uint64_t flexkv_agent_populated(const struct flexkv_agent *agent, int *all);

/* How often the controller has lowered the number of populated slots, plus 1; 0: it never does. It must be read before
 * that number. Any thread. */
uint64_t flexkv_agent_lowered(const struct flexkv_agent *agent);

/* Report a number to the controller: FLEXKV_NOTE_USABLE, FLEXKV_NOTE_FOLLOWED (nothing beyond the populated slots is pinned,
 * after the lowering with this number) or FLEXKV_NOTE_TAKES_PART. Any thread. */
void flexkv_agent_report(struct flexkv_agent *agent, uint32_t note, uint64_t value);

/* 1: the controller has ended the exchange, and no copy accesses the pages of peers any more. Any thread. */
int flexkv_agent_peers_released(const struct flexkv_agent *agent);

/* The oldest outcome that was not taken, or NULL. */
struct flexkv_outcome *flexkv_agent_take(struct flexkv_agent *agent);

/* Wait until there is an outcome, or the agent has ended. Returns 1, or 0 after timeout_ms. */
int flexkv_agent_wait(struct flexkv_agent *agent, int timeout_ms);

/* Wait until all windows of a span of a layerwise load, and of the spans before it, have been started, or never will
 * be. Returns 0, -ETIMEDOUT, or the agent's status if the agent has ended. */
int flexkv_agent_wait_span(struct flexkv_agent *agent, uint64_t task_id, uint32_t span, int timeout_ms);

/* Set the eventfds of layers. A load with a counter adds 1 to a layer's eventfd when the layer is in its pages. After
 * such a load has lost a block, no layer of it or of a later load is signalled, because a thread may wait for the last
 * of several loads. The caller owns arrays and eventfds; they must stay valid until the next call or
 * flexkv_agent_stop. */
void flexkv_agent_set_signals(struct flexkv_agent *agent, const struct flexkv_signals *signals);

/* 0 while the agent runs, else the reason of its end: -EPIPE (hang-up), -EBADMSG, -ECANCELED (stopped), ... */
int flexkv_agent_status(struct flexkv_agent *agent);

/* End the thread, wait for it and free everything. Returns 0: no copy accesses pages or slots any more. -ETIMEDOUT: the
 * device does not finish its copies, or a call of its driver does not return. Nothing is freed then, and the memory and
 * descriptors in the options must stay valid until the process ends. Takes little more than rest_timeout_ms. */
int flexkv_agent_stop(struct flexkv_agent *agent);

#endif
