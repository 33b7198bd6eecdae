"""The device agent: the native thread that copies between an engine's pages and host slots."""
import logging
import os
import sys
import warnings
from contextlib import suppress

import numpy as np

from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from flexkv._core.csrc.agent cimport (
    FLEXKV_NOTE_FOLLOWED,
    FLEXKV_NOTE_TAKES_PART,
    FLEXKV_NOTE_USABLE,
    flexkv_agent,
    flexkv_agent_advance,
    flexkv_agent_lowered,
    flexkv_agent_options,
    flexkv_agent_peers_released,
    flexkv_agent_populated,
    flexkv_agent_report,
    flexkv_agent_set_signals,
    flexkv_agent_start,
    flexkv_agent_status,
    flexkv_agent_stop,
    flexkv_agent_take,
    flexkv_agent_wait,
    flexkv_agent_wait_span,
    flexkv_host_backend,
    flexkv_kind,
    flexkv_outcome,
    flexkv_pages,
    flexkv_region,
    flexkv_signals,
    flexkv_span,
    FLEXKV_D2H,
    FLEXKV_H2D,
    FLEXKV_P2D,
)
from flexkv._core.csrc.cuda_api cimport cu_function, cu_stream
from flexkv._core.csrc.cuda_copy cimport (
    flexkv_cuda_backend,
    flexkv_cuda_copy,
    flexkv_cuda_copy_create,
    flexkv_cuda_copy_destroy,
    flexkv_cuda_copy_error,
    flexkv_cuda_copy_fence,
    flexkv_cuda_copy_follow,
    flexkv_cuda_copy_register,
    flexkv_cuda_copy_registered,
    flexkv_cuda_copy_unregister,
    flexkv_cuda_options,
)
from flexkv._core.device.cuda_driver cimport Device, Driver
from flexkv._core.mapping cimport SharedMapping
from flexkv._core.device.ring import FAREWELL
from flexkv.errors import CudaError, TransferError

logger = logging.getLogger("flexkv.client")

REGION_DTYPE = np.dtype([("base", "u8"), ("page_stride", "i8"), ("chunk_bytes", "u8"), ("slot_offset", "u8")])
"""For page p: ``chunk_bytes`` bytes at ``base + p * page_stride`` <-> ``slot_offset`` within the slot."""

SPAN_DTYPE = np.dtype(
    [("first", np.uint32), ("num_regions", np.uint32), ("slot_offset", np.uint64), ("bytes", np.uint64),
     ("max_chunk", np.uint64), ("group", np.uint64), ("peer_stride", np.uint64)]
)
"""Regions of one layer group, whose bytes follow one another in a slot or come from peers: ``struct flexkv_span``."""

assert REGION_DTYPE.itemsize == sizeof(flexkv_region) and SPAN_DTYPE.itemsize == sizeof(flexkv_span)

_left_behind = []
"""Memory and descriptors that a GPU which hangs may still touch; kept until the process ends."""


def spans_of(regions, ranges, group=0):
    """(n,) SPAN_DTYPE: a span of the layer group for each ``(first, end)`` of ``ranges``."""
    spans = np.zeros(len(ranges), dtype=SPAN_DTYPE)
    for span, (first, end) in zip(spans, ranges, strict=True):
        head, last = regions[first], regions[end - 1]
        span["first"], span["num_regions"], span["slot_offset"] = first, end - first, head["slot_offset"]
        span["bytes"] = last["slot_offset"] + last["chunk_bytes"] - head["slot_offset"]
        span["max_chunk"], span["group"] = regions["chunk_bytes"][first:end].max(), group
    return spans


cdef int milliseconds(double seconds) noexcept:
    """Convert a time to wait to milliseconds: 0 for none, 2e9 for 2e6 seconds or more."""
    return <int>(seconds * 1000) if 0 < seconds < 2e6 else 2000000000 if seconds > 0 else 0


STRATEGIES = ("auto", "staged", "direct", "batch")
"""Ways over the bus, in the order of ``enum flexkv_strategy``."""


cdef class DeviceAgent:
    """Runs until ``close``, or until the controller hangs up. The pages must stay valid until ``close``.

    Parameters
    ----------
    regions : ndarray of REGION_DTYPE
    num_pages : sequence of int
        Number of pages in each layer group.
    spans : ndarray of SPAN_DTYPE, optional
        Default: one span of all regions.
    saves, loads, layers : (int, int), optional
        First span and number of spans that a save, a load and a layerwise load move; default: all spans.
    shares, peers : (int, int)
        The same of the two steps of a load that reads peers' pages; none: such loads fail.
    imports : ExitStack, optional
        Owner of the peers' memory in this process; closed when no copy accesses it any more.
    pool_fd, pool_bytes : int
        The host pool: a memfd, mapped whole.
    slot_bytes : int
    ring_fd, ring_bytes : int
        A memfd with the two rings, of ``ring_bytes`` each.
    submission_event_fd, completion_event_fd, socket_fd : int
    keep_outcomes : bool
        Keep outcomes for ``take``; else they are dropped.
    device : Device, optional
        The GPU whose memory the regions are in; without it, this process's memory.
    move_function : int
        Handle of the kernel, on that device.
    strategy : str
        One of STRATEGIES.
    window_bytes, num_ctas : int
        Size of a staging buffer (three for each direction), thread blocks of the kernel.
    rest_timeout_s : float
        How long ``close`` waits for copies that are under way on the GPU.

    All descriptors become the agent's, also when this raises.
    """
    cdef flexkv_agent *agent
    cdef flexkv_cuda_copy *cuda
    cdef flexkv_pages at
    cdef Driver driver
    cdef int ended, socket_fd
    cdef uint64_t followed
    cdef object regions, spans, num_pages, signals, imports
    cdef SharedMapping pool, rings
    cdef list fds

    def __cinit__(self, *, regions, num_pages, spans=None, saves=None, loads=None, layers=None, shares=(0, 0),
                  peers=(0, 0), imports=None, int pool_fd, uint64_t pool_bytes, uint64_t slot_bytes, int ring_fd,
                  uint64_t ring_bytes, int submission_event_fd, int completion_event_fd, int socket_fd,
                  bint keep_outcomes=True, Device device=None,
                  uint64_t move_function=0, str strategy="auto", uint64_t window_bytes=0, uint32_t num_ctas=0,
                  double rest_timeout_s=10.0):
        cdef flexkv_agent_options options
        cdef int rc
        self.agent = NULL
        self.cuda = NULL
        self.ended = 0
        self.followed = 0
        self.socket_fd = socket_fd
        self.imports = imports
        self.fds = [submission_event_fd, completion_event_fd, socket_fd]
        try:
            self.pool = SharedMapping(pool_fd, pool_bytes)
            self.rings = SharedMapping(ring_fd, 2 * ring_bytes)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(pool_fd)
            os.close(ring_fd)
        self.at.pool = self.pool.data
        self.at.slot_bytes = slot_bytes
        self.at.num_slots = pool_bytes // slot_bytes
        self.set_tables(regions, spans, num_pages, saves, loads, layers)
        self.at.shares.first, self.at.shares.count = shares
        self.at.moves[<int>FLEXKV_P2D].first, self.at.moves[<int>FLEXKV_P2D].count = peers
        options.at = self.at
        options.backend = flexkv_host_backend
        if device is not None:
            try:
                self.open_device(device, move_function, strategy, window_bytes, num_ctas)
            except BaseException:
                self.close()
                raise
            options.backend = flexkv_cuda_backend(self.cuda)
        options.submissions = self.rings.data
        options.completions = self.rings.data + ring_bytes
        options.ring_bytes = ring_bytes
        options.submission_event_fd = submission_event_fd
        options.completion_event_fd = completion_event_fd
        options.socket_fd = socket_fd
        options.keep_outcomes = keep_outcomes
        options.rest_timeout_ms = <uint32_t>(rest_timeout_s * 1000)
        rc = flexkv_agent_start(&self.agent, &options)
        if rc:
            self.agent = NULL
            self.close()
            raise TransferError(f"the device agent did not start: {os.strerror(-rc)}")
        if self.cuda == NULL:
            flexkv_agent_report(self.agent, FLEXKV_NOTE_USABLE, self.at.num_slots)
            flexkv_agent_report(self.agent, FLEXKV_NOTE_FOLLOWED, ~<uint64_t>0)     # nothing is pinned

    cdef set_tables(self, regions, spans, num_pages, saves, loads, layers):
        cdef uint8_t[::1] region_view, span_view
        cdef uint64_t[::1] page_view
        self.regions = np.ascontiguousarray(regions, dtype=REGION_DTYPE).copy()
        spans = spans_of(self.regions, [(0, len(self.regions))]) if spans is None else spans
        self.spans = np.ascontiguousarray(spans, dtype=SPAN_DTYPE).copy()
        self.num_pages = np.array(num_pages, dtype=np.uint64)
        region_view, span_view = self.regions.view(np.uint8), self.spans.view(np.uint8)
        page_view = self.num_pages
        self.at.regions, self.at.num_regions = <const flexkv_region *>&region_view[0], len(self.regions)
        self.at.spans, self.at.num_spans = <const flexkv_span *>&span_view[0], len(self.spans)
        self.at.num_pages, self.at.num_groups = &page_view[0], len(self.num_pages)
        every = (0, len(self.spans))
        first, count = loads or every
        self.at.block_bytes = int(self.spans["bytes"][first : first + count].sum())
        self.at.moves[<int>FLEXKV_H2D].first, self.at.moves[<int>FLEXKV_H2D].count = first, count
        first, count = saves or every
        self.at.moves[<int>FLEXKV_D2H].first, self.at.moves[<int>FLEXKV_D2H].count = first, count
        first, count = layers or every
        self.at.layers.first, self.at.layers.count = first, count

    cdef open_device(self, Device device, uint64_t move_function, str strategy, uint64_t window_bytes,
                     uint32_t num_ctas):
        cdef flexkv_cuda_options options
        cdef int rc, error = 0
        options.context = device.context
        options.move = <cu_function>move_function
        options.window_bytes = window_bytes
        options.num_ctas = num_ctas
        options.strategy = STRATEGIES.index(strategy)
        self.driver = device.driver
        rc = flexkv_cuda_copy_create(&self.cuda, &device.driver.table, &options, &self.at, &error)
        device.driver.check(error, "setting up streams and staging buffers")
        if rc:
            raise MemoryError

    def take_part(self):
        """Let the controller send ops. To be called once, when all threads that take outcomes know this agent."""
        if self.agent != NULL:
            flexkv_agent_report(self.agent, FLEXKV_NOTE_TAKES_PART, 1)

    def pin_next(self):
        """Pin the next part of the memory that the controller has populated, or unpin a part that it takes back, and
        report the slots to the controller.

        Meant for a thread of its own: the driver holds a lock for milliseconds. Without a GPU nothing is pinned.

        Returns
        -------
        bool
            False: nothing can be pinned now; ``pinning`` is whether that changes.

        Raises
        ------
        CudaError
            Nothing more is pinned. All slots are reported: copies from and to the rest are slow, not wrong. Or a part
            cannot be unpinned: the controller does not use it any more, and cannot give it back.
        """
        cdef flexkv_cuda_copy *cuda = self.cuda
        cdef uint64_t slots, lowered
        cdef int rc, unpinned, all_populated = 0, more = 0, error = 0
        if cuda == NULL or self.agent == NULL:
            return False
        with nogil:
            lowered = flexkv_agent_lowered(self.agent)     # before the number that was lowered
            slots = flexkv_agent_populated(self.agent, &all_populated)
            unpinned = rc = flexkv_cuda_copy_unregister(cuda, slots, &error) if lowered > 1 else 0
            if not unpinned:
                if lowered > self.followed:
                    self.followed = lowered
                    flexkv_agent_report(self.agent, FLEXKV_NOTE_FOLLOWED, lowered)
                rc = flexkv_cuda_copy_register(cuda, slots, all_populated, &error)
            if rc > 0 or (rc and rc != -EAGAIN and not unpinned):
                slots = flexkv_cuda_copy_registered(cuda, &more) if rc > 0 else self.at.num_slots
                flexkv_agent_report(self.agent, FLEXKV_NOTE_USABLE, slots)
            if rc:
                flexkv_agent_advance(self.agent, 0, 0)     # wakes it: it may have found the lock held
        self.driver.check(error, "cuMemHostUnregister" if unpinned else "cuMemHostRegister")
        return rc == 1

    @property
    def pinned_slots(self):
        """Slots that are pinned, the first of the pool."""
        cdef int more = 0
        return flexkv_cuda_copy_registered(self.cuda, &more) if self.cuda != NULL else 0

    @property
    def pinning(self):
        """Whether ``pin_next`` has more to do, now or when the controller has populated more or takes some back."""
        cdef int more = 0
        if self.cuda != NULL and self.status == 0:
            flexkv_cuda_copy_registered(self.cuda, &more)
            return bool(more) or flexkv_agent_lowered(self.agent) > 0
        return False

    def fence(self, uint64_t stream, bint load, uint64_t fence):
        """Loads (else saves) with at most this fence wait for the work already queued on the compute stream.

        To be called before ``advance``.

        Raises
        ------
        CudaError
        """
        cdef flexkv_kind kind = FLEXKV_H2D if load else FLEXKV_D2H
        if self.cuda != NULL:
            self.driver.check(flexkv_cuda_copy_fence(self.cuda, kind, fence, <cu_stream>stream), "cuEventRecord")

    def follow(self, uint64_t task_id, uint32_t span, double timeout_s, uint64_t stream=0):
        """Have a compute stream wait for a span of a layerwise load; on the CPU, wait for it.

        The calling thread waits only until the load was given to the GPU; a load that cannot be made ends the wait too,
        and has an outcome that says so. False after ``timeout_s`` seconds, or when the agent has ended.

        Raises
        ------
        CudaError
        """
        cdef int timeout_ms = milliseconds(timeout_s), rc = -125
        if self.agent != NULL:
            with nogil:
                rc = flexkv_agent_wait_span(self.agent, task_id, span, timeout_ms)
        if rc == 0 and self.cuda != NULL:
            self.driver.check(flexkv_cuda_copy_follow(self.cuda, span, <cu_stream>stream), "cuStreamWaitEvent")
        return rc == 0

    @property
    def has_peers(self):
        """Whether memory of peers is mapped."""
        return self.imports is not None

    def release_peers(self):
        """Unmap the memory of the peers if the controller has ended the exchange and no copy reads it any more."""
        if self.agent != NULL and flexkv_agent_peers_released(self.agent):
            self.close_imports()

    def close_imports(self):
        imports, self.imports = self.imports, None
        if imports is not None:
            try:
                imports.close()
            except CudaError as error:
                logger.warning("the memory of a peer could not be unmapped: %s", error)

    def set_signals(self, list fds, span_of_layer):
        """Enable per-layer signals of loads with a counter: 1 is added to a layer's eventfd when the layer is in
        its pages. Once a block of such a load is lost, no further layer is signalled, and such loads fail.

        Parameters
        ----------
        fds : list of list of int
            Eventfds of each counter, one a layer. They stay the caller's, open until the next call or ``close``.
        span_of_layer : (num_layers,) uint32
            The span with a layer's last byte.
        """
        cdef flexkv_signals signals
        descriptors = np.ascontiguousarray(fds, dtype=np.int32)
        spans = np.ascontiguousarray(span_of_layer, dtype=np.uint32)
        if descriptors.ndim != 2 or spans.shape != descriptors.shape[1:] or descriptors.size == 0:
            raise ValueError(f"{descriptors.shape} eventfds for {spans.shape} layers")
        cdef const int[:, ::1] descriptor_view = descriptors
        cdef const uint32_t[::1] span_view = spans
        signals.fds, signals.span_of = &descriptor_view[0, 0], &span_view[0]
        signals.num_counters, signals.num_layers = <uint32_t>len(descriptors), <uint32_t>len(spans)
        if self.agent != NULL:
            flexkv_agent_set_signals(self.agent, &signals)
        self.signals = (descriptors, spans)

    @property
    def device_error(self):
        """The CudaError of the first call that failed while blocks were moved, or None."""
        cdef const char *function = NULL
        cdef int error = flexkv_cuda_copy_error(self.cuda, &function) if self.cuda != NULL else 0
        try:
            if error:
                self.driver.check(error, (<bytes>function).decode())
        except CudaError as reason:
            return reason
        return None

    def advance(self, uint64_t load_fence, uint64_t save_fence):
        """Let ops start whose fence is at most this; a fence never decreases."""
        if self.agent != NULL:
            flexkv_agent_advance(self.agent, load_fence, save_fence)

    def take(self):
        """The oldest outcome not taken yet: ``(task_id, kind, op_blocks, pages, ok)``, or None. ``pages``: (n,) int32;
        with several layer groups, (num_groups, n)."""
        cdef flexkv_outcome *outcome = flexkv_agent_take(self.agent) if self.agent != NULL else NULL
        if outcome == NULL:
            return None
        pages = np.empty((outcome.groups, outcome.count), dtype=np.int32)
        ok = np.empty(outcome.count, dtype=np.bool_)
        memcpy(<char *><size_t>pages.ctypes.data, outcome.pages, 4 * <size_t>outcome.count * outcome.groups)
        memcpy(<char *><size_t>ok.ctypes.data, outcome.ok, outcome.count)
        pages = pages if outcome.groups > 1 else pages[0]
        result = (outcome.task_id, outcome.kind, outcome.op_blocks, pages, ok)
        free(outcome)
        return result

    def wait(self, double timeout_s):
        """Wait for an outcome, or the end of the agent; False after ``timeout_s`` seconds without either."""
        cdef int timeout_ms = milliseconds(timeout_s), ready
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
        """Stop the thread. Can be called again.

        Returns
        -------
        bool
            Nothing touches pages or slots afterwards. False: the GPU hangs. Its copies may still touch both, so the
            memory of pool, rings and staging buffers stays until the process ends, and the pages must stay, too.
        """
        cdef flexkv_agent *agent = self.agent
        cdef int rc = 0
        if agent != NULL:
            self.agent = NULL
            self.ended = -125                          # ECANCELED
            with nogil:
                rc = flexkv_agent_stop(agent)
        elif self.ended == 0 and self.fds:             # never started: the controller needs to wait for nothing
            with suppress(OSError):
                os.write(self.socket_fd, FAREWELL)
            self.ended = -125
        if rc:
            logger.error("the GPU does not finish its copies: memory that it may still touch stays allocated until "
                         "this process ends, on purpose")
            _left_behind.append((self.pool, self.rings, self.regions, self.spans, self.num_pages, self.signals,
                                 self.driver, self.fds, self.imports))
            self.cuda = NULL
            self.fds = []
            self.imports = None
        if self.cuda != NULL:
            flexkv_cuda_copy_destroy(self.cuda)
            self.cuda = NULL
        self.pool = self.rings = None
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)
        self.close_imports()
        return rc == 0

    def __del__(self):
        if sys is None or sys.is_finalizing():         # modules are empty: the process's end releases the descriptors
            return
        if self.agent != NULL:
            warnings.warn("a DeviceAgent was not closed", ResourceWarning, stacklevel=2)
        self.close()
