"""The device agent: the native thread that copies between an engine's pages and host slots."""
import os
import sys
import warnings

import numpy as np

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from flexkv._core._csrc cimport (
    flexkv_agent,
    flexkv_agent_advance,
    flexkv_agent_options,
    flexkv_agent_start,
    flexkv_agent_status,
    flexkv_agent_stop,
    flexkv_agent_take,
    flexkv_agent_wait,
    flexkv_host_backend,
    flexkv_outcome,
    flexkv_region,
)
from flexkv._core.block_table import REGION_DTYPE
from flexkv._core.mapping cimport SharedMapping
from flexkv.errors import TransferError


cdef class DeviceAgent:
    """Runs until ``close``, or until the controller hangs up. The pages must stay valid until ``close``.

    Parameters
    ----------
    regions : ndarray of REGION_DTYPE
    num_pages : int
    pool_fd, pool_bytes : int
        The host pool: a memfd, mapped whole.
    slot_bytes, segment_offset : int
        Where this rank's part of slot i is: ``i * slot_bytes + segment_offset``.
    ring_fd, ring_bytes : int
        A memfd with the two rings, of ``ring_bytes`` each.
    submission_event_fd, completion_event_fd, socket_fd : int

    All descriptors become the agent's, also when this raises.
    """
    cdef flexkv_agent *agent
    cdef int ended
    cdef object regions
    cdef SharedMapping pool, rings
    cdef list fds

    def __cinit__(self, *, regions, uint64_t num_pages, int pool_fd, uint64_t pool_bytes, uint64_t slot_bytes,
                  uint64_t segment_offset, int ring_fd, uint64_t ring_bytes, int submission_event_fd,
                  int completion_event_fd, int socket_fd):
        cdef flexkv_agent_options options
        cdef uint8_t[::1] region_view
        cdef int rc
        self.agent = NULL
        self.ended = 0
        self.fds = [submission_event_fd, completion_event_fd, socket_fd]
        try:
            self.pool = SharedMapping(pool_fd, pool_bytes)
            self.rings = SharedMapping(ring_fd, 2 * ring_bytes)
        finally:
            os.close(pool_fd)
            os.close(ring_fd)
        self.regions = np.ascontiguousarray(regions, dtype=REGION_DTYPE).copy()
        region_view = self.regions.view(np.uint8)
        options.at.pool = self.pool.data
        options.at.slot_bytes = slot_bytes
        options.at.num_slots = pool_bytes // slot_bytes
        options.at.segment_offset = segment_offset
        options.at.regions = <const flexkv_region *>&region_view[0]
        options.at.num_regions = len(self.regions)
        options.at.num_pages = num_pages
        options.backend = flexkv_host_backend
        options.submissions = self.rings.data
        options.completions = self.rings.data + ring_bytes
        options.ring_bytes = ring_bytes
        options.submission_event_fd = submission_event_fd
        options.completion_event_fd = completion_event_fd
        options.socket_fd = socket_fd
        rc = flexkv_agent_start(&self.agent, &options)
        if rc:
            self.agent = NULL
            self.close()
            raise TransferError(f"the device agent did not start: {os.strerror(-rc)}")

    def advance(self, uint64_t load_fence, uint64_t save_fence):
        """Let ops start whose fence is at most this; a fence never goes back."""
        if self.agent != NULL:
            flexkv_agent_advance(self.agent, load_fence, save_fence)

    def take(self):
        """The oldest outcome not taken yet: ``(task_id, kind, op_blocks, pages, ok)``, or None."""
        cdef flexkv_outcome *outcome = flexkv_agent_take(self.agent) if self.agent != NULL else NULL
        if outcome == NULL:
            return None
        pages = np.empty(outcome.count, dtype=np.int32)
        ok = np.empty(outcome.count, dtype=np.bool_)
        memcpy(<char *><size_t>pages.ctypes.data, outcome.pages, 4 * <size_t>outcome.count)
        memcpy(<char *><size_t>ok.ctypes.data, outcome.ok, outcome.count)
        result = (outcome.task_id, outcome.kind, outcome.op_blocks, pages, ok)
        free(outcome)
        return result

    def wait(self, double timeout_s):
        """Wait for an outcome, or the end of the agent; False after ``timeout_s`` seconds without either."""
        cdef int timeout_ms = <int>(timeout_s * 1000), ready
        if self.agent == NULL:
            return True
        with nogil:
            ready = flexkv_agent_wait(self.agent, timeout_ms)
        return bool(ready)

    @property
    def status(self):
        """0 while it runs, then the negative errno that ended it."""
        return flexkv_agent_status(self.agent) if self.agent != NULL else self.ended

    def close(self):
        """Stop the thread; nothing touches pages or slots afterwards. Can be called again."""
        cdef flexkv_agent *agent = self.agent
        if agent != NULL:
            self.agent = NULL
            self.ended = -125                          # ECANCELED
            with nogil:
                flexkv_agent_stop(agent)
        self.pool = self.rings = None
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)

    def __dealloc__(self):
        if self.agent != NULL:
            flexkv_agent_stop(self.agent)

    def __del__(self):
        if self.agent != NULL and not sys.is_finalizing():
            warnings.warn("a DeviceAgent was not closed", ResourceWarning, stacklevel=2)
        self.close()
