"""The controller's end of the two shared-memory rings to one device agent."""
import os

import numpy as np

from libc.errno cimport EAGAIN, ENOSPC
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from flexkv._core.csrc.agent cimport (
    FLEXKV_FAREWELL,
    FLEXKV_MSG_CANCEL,
    FLEXKV_MSG_OP,
    FLEXKV_MSG_RESULT,
    FLEXKV_NOTE_ALL_POPULATED,
    FLEXKV_NOTE_EXCHANGE,
    FLEXKV_NOTE_EXCHANGE_OVER,
    FLEXKV_NOTE_FOLLOWED,
    FLEXKV_NOTE_LOAD_FENCE,
    FLEXKV_NOTE_LOWERED,
    FLEXKV_NOTE_POPULATED,
    FLEXKV_NOTE_SAVE_FENCE,
    FLEXKV_NOTE_TAKES_PART,
    FLEXKV_NOTE_USABLE,
    flexkv_msg_cancel,
    flexkv_msg_op,
    flexkv_msg_result,
)
from flexkv._core.csrc.ring cimport (
    flexkv_part,
    flexkv_ring_note,
    flexkv_ring_pop,
    flexkv_ring_push,
    flexkv_ring_read_note,
)
from flexkv._core.ring_pair cimport RingPair
from flexkv.errors import RingCorruptedError

cdef object BOOL = np.dtype(np.bool_)

FAREWELL = bytes([FLEXKV_FAREWELL])
"""All that an agent says on its socket: it has ended, and touches no slot any more."""

cdef enum:
    CANCEL_BYTES = 16           # of a record that cancels an op: its header and an id


cdef class ControllerRings(RingPair):
    """The controller's end of two rings: it sends ops to the agent, and receives results.

    Parameters
    ----------
    data_bytes : int
        Data bytes of each ring; a power of two, at least 4096.
    num_groups : int
        Layer groups of the agent's rank.

    Attributes
    ----------
    max_blocks : int
        Largest op that one record may hold: an eighth of the ring, so that records fit beside the room for cancels.
    """
    cdef readonly Py_ssize_t max_blocks
    cdef uint32_t num_groups

    def __cinit__(self, Py_ssize_t data_bytes, uint32_t num_groups=1):
        self.num_groups = num_groups
        self.open("rings", data_bytes, True)
        cdef Py_ssize_t op_bytes = self.max_record // 4 - <Py_ssize_t>sizeof(flexkv_msg_op)
        self.max_blocks = op_bytes // (4 * (1 + self.num_groups))

    def push_op(self, uint64_t op_id, uint64_t task_id, int kind, uint64_t fence, const int32_t[::1] slots not None,
                const int32_t[::1] pages not None, uint32_t op_blocks, uint32_t flags=0, uint32_t counter=0,
                uint32_t outstanding=0):
        """Give the agent an op on up to ``max_blocks`` blocks; False if the ring is full now. ``slots``: (n,);
        ``pages``: (num_groups * n,), those of the first layer group first; -1: the block has no page in the group.
        ``flags``: OpFlag; ``counter``: whose eventfds signal the load's layers, from 1. ``outstanding``: ops that may
        be cancelled yet, besides this one; the ring keeps room for their cancels.

        Raises
        ------
        RingCorruptedError
        """
        cdef flexkv_msg_op msg
        cdef flexkv_part parts[3]
        cdef uint32_t count = <uint32_t>slots.shape[0]
        if count == 0 or pages.shape[0] != <Py_ssize_t>count * self.num_groups:
            raise ValueError(f"{count} slots and {pages.shape[0]} pages for {self.num_groups} layer groups")
        if count > self.max_blocks:
            raise ValueError(f"an op of {count} blocks, and at most {self.max_blocks} fit a record: split it")
        msg.op_id, msg.task_id, msg.fence, msg.kind = op_id, task_id, fence, kind
        msg.count, msg.op_blocks, msg.flags, msg.counter = count, op_blocks, flags, counter
        msg.groups = self.num_groups
        parts[0].data, parts[0].size = &msg, sizeof(msg)
        parts[1].data, parts[1].size = &slots[0], 4 * count
        parts[2].data, parts[2].size = &pages[0], 4 * count * self.num_groups
        return self.push(FLEXKV_MSG_OP, parts, 3, CANCEL_BYTES * (<uint64_t>outstanding + 2))

    def push_cancel(self, uint64_t op_id):
        """Ask the agent to stop an op; False if the ring is full now."""
        cdef flexkv_msg_cancel msg
        cdef flexkv_part part
        msg.op_id = op_id
        part.data, part.size = &msg, sizeof(msg)
        return self.push(FLEXKV_MSG_CANCEL, &part, 1, 0)

    cdef int push(self, uint32_t kind, const flexkv_part *parts, int num_parts, uint64_t reserve) except -1:
        cdef int rc
        with nogil:
            rc = flexkv_ring_push(&self.sending, kind, parts, num_parts, reserve)
        if rc == 0:
            return True
        if rc == -ENOSPC:
            return False
        raise RingCorruptedError("the agent's position in the ring of ops is impossible")

    def pop_result(self):
        """The next result, ``(op_id, first, ok, last)`` with ``ok`` (count,) bool, read-only, or None.

        Raises
        ------
        RingCorruptedError
            The agent wrote an invalid result.
        """
        cdef uint32_t kind
        cdef int64_t size = flexkv_ring_pop(&self.receiving, &kind, self.buffer, self.ring_bytes)
        cdef flexkv_msg_result msg
        if size == -EAGAIN:
            return None
        if size >= <int64_t>sizeof(msg) and kind == FLEXKV_MSG_RESULT:
            memcpy(&msg, self.buffer, sizeof(msg))
            if size == <int64_t>sizeof(msg) + msg.count:
                for i in range(msg.count):
                    self.buffer[sizeof(msg) + i] = self.buffer[sizeof(msg) + i] == 1
                ok = np.frombuffer((<const char *>self.buffer)[sizeof(msg) : size], dtype=BOOL)
                return msg.op_id, msg.first, ok, bool(msg.last)
        raise RingCorruptedError("the ring of results holds an invalid record")

    def note_populated(self, uint64_t num_slots, bint last):
        """Publish the number of populated slots of the pool; ``last``: there will be no more."""
        if not last:
            flexkv_ring_note(&self.sending, FLEXKV_NOTE_ALL_POPULATED, 0)
        flexkv_ring_note(&self.sending, FLEXKV_NOTE_POPULATED, num_slots)
        if last:
            flexkv_ring_note(&self.sending, FLEXKV_NOTE_ALL_POPULATED, 1)

    def end_exchange(self):
        """Announce that a peer of the agent has left: its memory must not be read any more."""
        flexkv_ring_note(&self.sending, FLEXKV_NOTE_EXCHANGE_OVER, 1)
        os.eventfd_write(self.sending_event_fd, 1)

    def note_lowered(self, uint64_t count):
        """Publish how often the number of populated slots was lowered, plus 1, after that number; without it, the agent
        ends its look at these numbers when it has pinned all slots."""
        flexkv_ring_note(&self.sending, FLEXKV_NOTE_LOWERED, count)

    @property
    def followed(self):
        """The last lowering after which the agent has nothing pinned beyond the populated slots, as it says: any 64-bit
        number."""
        return flexkv_ring_read_note(&self.receiving, FLEXKV_NOTE_FOLLOWED)

    @property
    def takes_part(self):
        """Whether ops may be sent to the agent."""
        return flexkv_ring_read_note(&self.receiving, FLEXKV_NOTE_TAKES_PART) != 0

    @property
    def usable_slots(self):
        """Slots that the agent can copy from and to, as it says: any 64-bit number."""
        return flexkv_ring_read_note(&self.receiving, FLEXKV_NOTE_USABLE)

    @property
    def exchanges(self):
        """Whether the agent can copy from its peers' pages, as it says."""
        return flexkv_ring_read_note(&self.receiving, FLEXKV_NOTE_EXCHANGE) == 1

    def reached(self, bint load):
        """The highest fence of loads (else of saves) whose compute is done, as the agent says: any 64-bit number."""
        return flexkv_ring_read_note(&self.receiving, FLEXKV_NOTE_LOAD_FENCE if load else FLEXKV_NOTE_SAVE_FENCE)
