"""The storage host: keeps a node's part of the KV of an engine whose controller is on another node."""

import logging
import math
import select
import socket
import threading
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flexkv.config import FlexKVConfig, TransferConfig
from flexkv.config.numa import read_numa_nodes
from flexkv.controller.host_memory import HostMemory
from flexkv.controller.listener import Listener, RankGroup
from flexkv.errors import NodeLinkError, RegistrationError, TransferError
from flexkv.protocol.node_frames import CHALLENGE_BYTES, PROOF_BYTES, Frames, Greeting
from flexkv.protocol.nodes import (
    HOST_SILENCE_S,
    FrameKind,
    Join,
    NodeOp,
    Terms,
    pack_json,
    pack_number,
    pack_result,
    parse_number,
    parse_terms,
)
from flexkv.protocol.ring import OpFlag, OpKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import OpStatus, PartOf, TransferGraph, TransferOp
from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.server")

_RETRY_S = 0.5
"""Pause between two attempts to connect, in seconds."""

_LOOK_S = 0.02
"""Interval at which the end of a connection, and the readiness of the ranks, are looked at, in seconds."""

_RESEND_S = 0.002
_CLIENT = 0
"""Number of the engine in the data plane of a storage host, which has one."""


class StorageHost:
    """Connects to the controller of an engine, registers the ranks of its own node, and runs the controller's ops on
    them and on a host pool of its own.

    If the connection is lost, it cancels all ops, disconnects its ranks, and connects again; the ranks register again,
    and the pool keeps its content.

    Parameters
    ----------
    config : FlexKVConfig
        ``master_host``, ``master_ports``, ``node_secret``: of the controller; ``cpu_cache_gb`` or ``num_cpu_blocks``:
        size of the pool.
    port : str
        Path of the Unix socket where the ranks register.
    """

    def __init__(self, config: FlexKVConfig, port: str) -> None:
        cache = config.cache
        self._config, self._port = config.transfer, port
        self._memory = HostMemory(
            cache.host_bytes, cache.num_cpu_blocks, cache.hugepage_bytes, replaces=True,
            numa_nodes=read_numa_nodes(cache.numa_nodes),
        )
        self._controller = ""                        # the last one
        self._log = RepeatedLog(logger)
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let ``run`` return. Any thread, and a signal handler, may call it."""
        self._stop.set()

    def run(self) -> None:
        """Serve the controller until ``stop``; frees the pool at the end. To be called once. Without a connection, with
        another secret, or if the ranks' socket cannot be opened, it tries again each 0.5 s, and logs the reason.

        Raises
        ------
        TransferError
            A copy does not end, so that the ranks cannot be used for another connection.
        """
        logged = ""
        try:
            while not self._stop.is_set():
                try:
                    frames, terms = _connect(self._config, self._stop)
                except (OSError, UnicodeError, NodeLinkError) as error:
                    if str(error) != logged:
                        logger.warning(
                            "no connection to the controller at %s:%d: %s", self._config.master_host,
                            self._config.master_port, error,
                        )
                    logged = str(error)
                else:
                    logged = ""
                    self._attach(frames, terms)
                self._stop.wait(_RETRY_S)
        finally:
            self._memory.close()

    def _attach(self, frames: Frames, terms: Terms) -> None:
        if terms.controller != self._controller:     # the content is that of another one
            self._memory.renew()
        self._controller = terms.controller
        try:
            _Attachment(self._config, self._port, self._memory, frames, terms).run(self._stop)
        except RegistrationError as error:
            self._log.write(logging.ERROR, f"the ranks of this node cannot register: {error}")


def _connect(config: TransferConfig, stop: threading.Event) -> tuple[Frames, Terms]:
    """Connect to the controller, and authenticate."""
    deadline = time.monotonic() + config.handshake_timeout_s
    connection = socket.create_connection((config.master_host, config.master_port), config.handshake_timeout_s)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting = Greeting(config.node_secret)
        connection.setblocking(False)
        remedy = "another program listens there, or it is ending"
        connection.send(greeting.reply_to(_receive(connection, CHALLENGE_BYTES, remedy, deadline, stop)))
        remedy = "set the same node_secret on all nodes"
        greeting.check(_receive(connection, PROOF_BYTES, remedy, deadline, stop))
        receiving_key, sending_key = greeting.keys()
        frames = Frames(connection, sending_key, receiving_key)
        while (frame := frames.receive()) is None:
            if frames.has_ended():
                raise NodeLinkError("it has closed the connection before it sent its terms")
            _wait_readable(connection, deadline, stop)
        if frame[0] is not FrameKind.TERMS:
            raise NodeLinkError(f"a frame of kind {frame[0].name} in place of TERMS")
        return frames, parse_terms(frame[1])
    except BaseException:
        connection.close()
        raise


def _receive(connection: socket.socket, size: int, remedy: str, deadline: float, stop: threading.Event) -> bytes:
    data = b""
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except BlockingIOError:
            _wait_readable(connection, deadline, stop)
            continue
        if not part:
            raise NodeLinkError(f"it has closed the connection: {remedy}")
        data += part
    return data


def _wait_readable(connection: socket.socket, deadline: float, stop: threading.Event) -> None:
    """Wait a moment for the controller's bytes; NodeLinkError after the deadline, or if this process must end."""
    left = deadline - time.monotonic()
    if left <= 0 or stop.is_set():
        raise NodeLinkError("it does not answer in time")
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.poll(math.ceil(1000 * min(left, _LOOK_S)))


class _Attachment:
    """One connection to the controller, with a data plane of its own."""

    def __init__(
        self, config: TransferConfig, port: str, memory: HostMemory, frames: Frames, terms: Terms
    ) -> None:
        self._frames, self._memory, self._terms = frames, memory, terms
        self._usable, self._has_joined = 0, False
        self._lost = threading.Event()
        self._transfer = TransferEngine(config, on_capacity=self._on_capacity, housekeeping=self._housekeeping)
        self._listener = Listener(replace(config, exchange_copies=False), self._transfer, memory, keeps_memory=True)
        self._port = port

    def run(self, stop: threading.Event) -> None:
        """Serve until the connection is lost, or ``stop`` is set."""
        transfer, listener, fd = self._transfer, self._listener, self._frames.connection.fileno()
        group = RankGroup(_CLIENT, self._terms.num_ranks, self._terms.dp_client_id, self._terms.first_task)
        try:
            listener.start(group, self._port)
            listener.watch.add(fd, self._hear, lambda error: self._lose(str(error)))
            transfer.wake()
            logger.info("connected to the controller; %d ranks can register at %s", group.num_ranks, self._port)
            while not self._has_joined and not self._lost.is_set() and not stop.is_set():
                if listener.is_ready(_CLIENT):
                    transfer.call_soon(self._join)
                    break
                self._lost.wait(_LOOK_S)
            while not self._lost.is_set() and not stop.is_set():
                self._lost.wait(_LOOK_S)
        finally:
            transfer.shutdown()
            self._frames.close()
        if not transfer.at_rest:
            raise TransferError("a copy does not end: this process must end before the ranks can be used again")

    # ---- on the background thread -----------------------------------------------------------------------------

    def _join(self) -> None:
        """Offer the ranks to the controller."""
        hellos = self._transfer.hellos(_CLIENT)
        if len(hellos) < self._terms.num_ranks:
            self._lose("a rank has left before all had joined")
            return
        pages = tuple(min(counts) for counts in zip(*(hello.num_pages for hello in hellos), strict=True))
        ranks = tuple(sorted((hello.pp_rank, hello.rank) for hello in hellos))
        num_slots = self._listener.host_pool.num_slots
        self._frames.push(FrameKind.JOIN, pack_json(Join(self._memory.incarnation, ranks, pages, num_slots)))
        self._has_joined = True
        self._frames.push(FrameKind.USABLE, pack_number(self._usable))
        logger.info("%d ranks are offered to the controller", len(ranks))

    def _on_capacity(self, num_slots: int) -> None:
        self._usable = num_slots
        if self._has_joined:
            self._frames.push(FrameKind.USABLE, pack_number(num_slots))

    def _hear(self) -> None:
        """Handle the controller's messages."""
        try:
            while (frame := self._frames.receive()) is not None:
                kind, payload = frame
                if kind is FrameKind.PING:
                    self._frames.push(FrameKind.PONG)
                elif kind is FrameKind.OP and self._has_joined:
                    self._run_op(NodeOp.unpack(payload))
                elif kind is FrameKind.CANCEL:
                    self._transfer.cancel(parse_number(payload))
                else:
                    raise NodeLinkError(f"an unexpected frame of kind {kind.name}")
        except NodeLinkError as error:
            self._lose(str(error))
            return
        if self._frames.has_ended():
            self._lose("the controller has closed it")

    def _run_op(self, op: NodeOp) -> None:
        """Run a part of an op on this node's ranks."""
        pages, further = op.pages[0], op.pages[1:] if len(op.pages) > 1 else None
        src, dst = (op.slots, pages) if op.kind is OpKind.H2D else (pages, op.slots)
        graph = TransferGraph(op.part_id, [TransferOp(
            op.kind, src, dst, _CLIENT, op.fence, bool(op.flags & OpFlag.LAYERWISE), op.counter, further_pages=further,
            part_of=PartOf(op.task_id, op.op_blocks, bool(op.flags & OpFlag.MORE)),
        )])
        if op.flags & OpFlag.CANCELLED:
            graph.verdict = OpStatus.CANCELLED
        self._transfer.submit(graph, self._report, background=True)

    def _report(self, graph: TransferGraph) -> None:
        if self._transfer.at_rest is False:          # the agent was disconnected while it copied
            return
        ok: NDArray[np.bool_] = graph.ops[0].ok
        self._frames.push(FrameKind.RESULT, pack_result(graph.task_id, ok))

    def _housekeeping(self) -> float:
        if time.monotonic() - self._frames.heard > HOST_SILENCE_S and not self._frames.has_news():
            self._lose(f"the controller has sent nothing for {HOST_SILENCE_S:g} s")
        if self._has_joined and len(self._transfer.hellos(_CLIENT)) < self._terms.num_ranks:
            self._lose("a rank of this node has left")
        return HOST_SILENCE_S / 8 if self._frames.flush() else _RESEND_S

    def _lose(self, reason: str) -> None:
        if not self._lost.is_set():
            self._lost.set()
            logger.warning("the connection to the controller is lost: %s", reason)
            self._listener.watch.remove(self._frames.connection.fileno())

