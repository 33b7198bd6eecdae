"""The controller's link to the storage host of another node, which runs parts of ops on all ranks of its node."""

import logging
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import NodeLinkError
from flexkv.protocol.node_frames import Frames
from flexkv.protocol.nodes import (
    CONTROLLER_SILENCE_S,
    MAX_BLOCKS,
    PING_S,
    FrameKind,
    Join,
    NodeOp,
    pack_number,
    parse_number,
    parse_result,
)
from flexkv.protocol.registration import Hello
from flexkv.protocol.ring import OpKind
from flexkv.transfer.executors.agent_link import AgentLink, Peer
from flexkv.transfer.graph import TransferOp

Ranks = tuple[tuple[int, int], ...]
"""``(pp_rank, rank)`` of the ranks of a node, ascending."""

_MAX_UNSENT_BYTES = 1 << 20
"""Bytes that may wait for room in the socket, before a part waits."""

_MAX_MISSED = 4096
"""Ops that are kept for an absent node."""


class NodeChannel:
    """Sends parts of ops to a storage host, and receives their results, as ``ControllerRings`` does for an agent.

    Attributes
    ----------
    usable_slots : int
        Slots of the node's pool that its ranks can copy from and to.
    max_blocks : int
        Blocks of a part at most.
    receiving_event_fd : int
        -1: the results arrive on the connection.
    exchanges : bool
        False: an exchange does not cross nodes.
    """

    max_blocks = MAX_BLOCKS
    takes_part = True
    receiving_event_fd = -1
    exchanges = False

    def __init__(self, frames: Frames, num_groups: int) -> None:
        self.frames = frames
        self._num_groups = num_groups
        self.usable_slots = 0

    def push_op(
        self, op_id: int, task_id: int, kind: int, fence: int, slots: NDArray[np.int32], pages: NDArray[np.int32],
        op_blocks: int, flags: int = 0, counter: int = 0, outstanding: int = 0,
    ) -> bool:
        """Send a part; False: the connection has no room now. Arguments as ``ControllerRings.push_op``."""
        if not self._has_room():
            return False
        table = pages.reshape(self._num_groups, len(slots))
        op = NodeOp(op_id, task_id, fence, OpKind(kind), int(flags), counter, op_blocks, slots, table)
        self.frames.push(FrameKind.OP, op.pack())
        return True

    def push_cancel(self, op_id: int) -> bool:
        """Ask the storage host to stop a part; False: the connection has no room now."""
        if not self._has_room():
            return False
        self.frames.push(FrameKind.CANCEL, pack_number(op_id))
        return True

    def _has_room(self) -> bool:
        return self.frames.unsent_bytes < _MAX_UNSENT_BYTES or self.frames.flush()

    def pop_result(self) -> tuple[int, int, NDArray[np.bool_], bool] | None:
        """The next result, as ``ControllerRings.pop_result``, or None. Every part has one result.

        Raises
        ------
        NodeLinkError
            The storage host sent an invalid message.
        """
        while (frame := self.frames.receive()) is not None:
            kind, payload = frame
            if kind is FrameKind.RESULT:
                part_id, ok = parse_result(payload)
                return part_id, 0, ok, True
            if kind is FrameKind.USABLE:
                self.usable_slots = parse_number(payload)
            elif kind is not FrameKind.PONG:
                raise NodeLinkError(f"a frame of kind {kind.name} from a storage host that has joined")
        return None

    def note_populated(self, num_slots: int, last: bool) -> None:
        """Do nothing: the node has a pool of its own."""

    def end_exchange(self) -> None:
        """Do nothing: there is none."""

    def note_lowered(self, count: int) -> None:
        """Do nothing: the node has a pool of its own."""

    @property
    def followed(self) -> int:
        """0: a pool with storage hosts does not shrink."""
        return 0

    def reached(self, load: bool) -> float:
        """Infinite: the fences of the other nodes are not known here, and those of this node show how far the step
        is."""
        return np.inf

    def spin(self, nanoseconds: int) -> bool:
        """Whether results may have arrived; does not poll, because they take longer than that."""
        return self.frames.has_news()

    def set_waiting(self, waiting: bool) -> bool:
        """False: the background thread watches the connection in any case."""
        return False

    def close(self) -> None:
        """Close the connection."""
        self.frames.close()


class NodeRest:
    """Whether the ranks of a node that is lost are known to access no slot and no page for it any more. Takes the place
    of the ``PeerProcess`` of an agent.

    Attributes
    ----------
    fd : int
        An eventfd, readable from ``report`` on.
    is_gone : bool
    """

    pid = 0

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_gone = False

    def report(self) -> None:
        """Record that they are at rest: the storage host has joined again."""
        self.is_gone = True
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the descriptor. Can be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class NodeLink(AgentLink):
    """The controller's link to a storage host that has joined.

    Parameters
    ----------
    frames : Frames
        Owned by the link.
    hello : Hello
        Describes the ranks of the node as one.
    join : Join
    address : str
        Of the node, for log lines.

    Attributes
    ----------
    ranks : Ranks
    incarnation : str
    rest : NodeRest
    """

    needs_slots = True                               # its pool is another one

    def __init__(self, frames: Frames, hello: Hello, join: Join, address: str) -> None:
        self.rest = NodeRest()
        self.ranks, self.incarnation = join.ranks, join.incarnation
        self._address, self._frames = address, frames
        self._pinged = 0.0
        super().__init__(frames.connection, hello, NodeChannel(frames, len(join.num_pages)))

    def _process(self) -> Peer:
        return self.rest

    @property
    def name(self) -> str:
        """The node, for a log line."""
        return f"the storage host at {self._address} ({len(self.ranks)} ranks)"

    @property
    def is_connected(self) -> bool:
        """Whether the storage host takes ops: it has not left, and its messages are trusted."""
        return self.healthy and self.connection.fileno() >= 0 and not self._frames.has_ended()

    def drain_event(self) -> bool:
        """Whether the storage host has left, or is not trusted any more. Its messages are received by ``drain``."""
        return not self.healthy or self._frames.has_ended()

    def disconnect(self, reason: str, level: int = logging.ERROR) -> None:
        """Close the connection in both directions: there is no farewell, and only a new JOIN proves rest."""
        super().disconnect(reason, level)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def clear_news(self) -> None:
        """Do nothing: there is no eventfd."""

    @property
    def backlog(self) -> bool:
        """Whether messages wait for room in the connection."""
        return super().backlog or (self.healthy and self._frames.unsent_bytes > 0)

    def flush(self) -> None:
        """Send waiting messages as far as there is room."""
        self._frames.flush()
        super().flush()

    def check_silence(self) -> None:
        """Send a PING if one is due; close the connection of a storage host that sends nothing."""
        now = time.monotonic()
        if now - self._frames.heard > CONTROLLER_SILENCE_S and not self._frames.has_news():
            self.disconnect(f"it has sent nothing for {CONTROLLER_SILENCE_S:g} s")
        elif now - self._pinged >= PING_S:
            self._pinged = now
            self._frames.push(FrameKind.PING)
        self._frames.flush()


class MissedOps:
    """Ops that absent nodes of an engine have not received, or not answered. They have failed, and the ranks of these
    nodes must learn that: their workers wait for the result of each task. A node gets them as cancelled, as a whole,
    when it is back; 4,096 of each node are kept. Nodes are known from their first join on; no op comes before. Every
    method is called under the engine's lock."""

    def __init__(self) -> None:
        self._missed: dict[Ranks, dict[TransferOp, None]] = {}

    def record(self, op: TransferOp, links: Iterable[AgentLink]) -> None:
        """Record an op for the nodes that are not in ``links``."""
        present = {link.ranks for link in links if isinstance(link, NodeLink)}
        for ranks in self._missed.keys() - present:
            self._add(self._missed[ranks], op)

    def leave(self, link: AgentLink, ops: Iterable[TransferOp]) -> None:
        """Record the ops that a connection which has ended did not answer."""
        if isinstance(link, NodeLink):
            for op in ops:
                self._add(self._missed[link.ranks], op)

    def _add(self, missed: dict[TransferOp, None], op: TransferOp) -> None:
        missed[op] = None
        if len(missed) > _MAX_MISSED:
            del missed[next(iter(missed))]

    def join(self, link: AgentLink) -> list[TransferOp]:
        """Return and forget the ops that the node of a link has missed."""
        if not isinstance(link, NodeLink):
            return []
        missed, self._missed[link.ranks] = self._missed.get(link.ranks, {}), {}
        return list(missed)
