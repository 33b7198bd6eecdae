"""The controller's link to one rank's agent: parts of ops that were sent to it, and their results."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import RingCorruptedError
from flexkv.protocol.peer_process import PeerProcess
from flexkv.protocol.registration import FAREWELL, MAX_MESSAGE_BYTES, Hello
from flexkv.protocol.ring import OpFlag, OpKind
from flexkv.transfer.executor import Progress
from flexkv.transfer.graph import TransferOp
from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.transfer")


@dataclass(eq=False, slots=True)
class Flight:
    """An op in progress on the ranks that it concerns. A block is complete when each of them has reported it.

    Attributes
    ----------
    missing : (n,) int16
        Number of ranks that have not reported each block yet.
    """

    op: TransferOp
    progress: Progress
    missing: NDArray[np.int16]
    ok: NDArray[np.bool_]
    cancelled: bool = False
    parts: list["Part"] = field(default_factory=list)

    def answer(self, indices: NDArray[np.intp] | slice, ok: NDArray[np.bool_]) -> None:
        """Record one rank's results of the blocks ``indices``, and report the blocks that are complete."""
        self.missing[indices] -= 1
        self.ok[indices] &= ok
        missing = self.missing[indices]
        if len(missing) and not np.count_nonzero(missing):
            self.progress(self.op, indices, self.ok[indices])
            return
        if isinstance(indices, slice):
            indices = np.arange(len(self.op))[indices]
        complete = indices[missing == 0]
        if len(complete):
            self.progress(self.op, complete, self.ok[complete])


@dataclass(eq=False, slots=True)
class Part:
    """Blocks of an op for one rank that fit into one record of its ring.

    Attributes
    ----------
    first : int
        The first block, if the blocks are consecutive; else -1. NumPy reads and writes a slice several times faster
        than a list of indices.
    answered : int
        Number of results received.
    """

    part_id: int
    flight: Flight
    indices: NDArray[np.intp]
    flags: int
    first: int = -1
    answered: int = 0

    def rows(self, start: int, stop: int) -> NDArray[np.intp] | slice:
        """Indices in the op of the part's blocks ``[start, stop)``."""
        return self.indices[start:stop] if self.first < 0 else slice(self.first + start, self.first + stop)


class OpChannel(Protocol):
    """Sends parts of ops to an agent or a node, and receives their results: the methods of ``ControllerRings`` that a
    link uses, with the same meaning."""

    @property
    def max_blocks(self) -> int: ...
    @property
    def receiving_event_fd(self) -> int: ...
    @property
    def takes_part(self) -> bool: ...
    @property
    def usable_slots(self) -> int: ...
    @property
    def exchanges(self) -> bool: ...
    def end_exchange(self) -> None: ...
    def push_op(
        self, op_id: int, task_id: int, kind: int, fence: int, slots: NDArray[np.int32], pages: NDArray[np.int32],
        op_blocks: int, flags: int = 0, counter: int = 0, outstanding: int = 0,
    ) -> bool: ...
    def push_cancel(self, op_id: int) -> bool: ...
    def pop_result(self) -> tuple[int, int, NDArray[np.bool_], bool] | None: ...
    def note_populated(self, num_slots: int, last: bool) -> None: ...
    def note_lowered(self, count: int) -> None: ...
    @property
    def followed(self) -> int: ...
    def reached(self, load: bool) -> float: ...
    def spin(self, nanoseconds: int) -> bool: ...
    def set_waiting(self, waiting: bool) -> bool: ...
    def close(self) -> None: ...


class Peer(Protocol):
    """The process of an agent, as ``PeerProcess``."""

    @property
    def pid(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def is_gone(self) -> bool: ...
    def close(self) -> None: ...


class AgentLink:
    """The controller's link to one rank's agent.

    Parameters
    ----------
    connection : socket
        Non-blocking, after the handshake; owned by the link.
    hello : Hello
    rings : OpChannel
        Owned by the link.
    writes : bool
        Whether the rank writes a part of a slot; otherwise it only reads.

    Attributes
    ----------
    process : Peer
        Process of the agent; owned by the link.
    is_detached : bool
        It takes no more ops.
    caught_up : bool
        It takes part, and can copy from and to the usable slots: see ``PoolGrowth``.
    is_at_rest : bool
        It accesses no slot any more: it has said farewell, or its process has ended.
    said_farewell : bool
        The agent has ended on purpose: it accesses no slot and no page any more.
    exchange : int
        Number of the exchange of which the rank knows its peers' memory; 0: it does not.
    spared_bytes : int
        Bytes of a block that the rank does not read from host memory in an exchange.
    on_backlog : callable
        Called when the ring has no room for a message; ``flush`` must then be called until ``backlog`` is False.
    """

    needs_slots = False
    """Whether it can copy from and to the slots alone that it reports as usable."""

    def __init__(
        self, connection: socket.socket, hello: Hello, rings: OpChannel, writes: bool = True
    ) -> None:
        self.connection = connection
        self.hello = hello
        self.rings = rings
        self.writes = writes
        self.process = self._process()
        self.said_farewell = False
        self.on_backlog: Callable[[], None] = lambda: None
        self._outstanding: dict[int, Part] = {}
        self._backlog: deque[Part] = deque()
        self._cancels: deque[int] = deque()
        self._disconnected = self.is_detached = self.is_at_rest = False
        self.exchange = self.spared_bytes = 0
        self.caught_up = False
        self._log = RepeatedLog(logger)

    def _process(self) -> Peer:
        return PeerProcess(self.connection)

    @property
    def name(self) -> str:
        """The rank, for a log line."""
        return f"rank {self.hello.rank} (process {self.process.pid})"

    # ---- to the agent -----------------------------------------------------------------------------------------

    def submit(self, part: Part) -> None:
        """Send a part to the agent, now or as soon as the ring has room."""
        self._backlog.append(part)
        self._send()

    def cancel(self, flight: Flight) -> None:
        """Request the agent to stop the parts of a flight that it has received. Parts still in the backlog are sent as
        cancelled."""
        for part in flight.parts:
            if part.part_id in self._outstanding:
                self._cancels.append(part.part_id)
        self._send()

    def _send(self) -> None:
        self.flush()
        if self.backlog:
            self.on_backlog()

    @property
    def backlog(self) -> bool:
        """Whether messages wait for room in the ring."""
        return bool(self._backlog or self._cancels) and not self._disconnected

    def flush(self) -> None:
        """Write waiting messages while the ring has room."""
        if self._disconnected:
            return
        try:
            while self._cancels and self.rings.push_cancel(self._cancels[0]):
                self._cancels.popleft()
            while self._backlog and not self._cancels and self._push(self._backlog[0]):
                pass
        except RingCorruptedError as error:
            self.disconnect(str(error))

    def _push(self, part: Part) -> bool:
        """Write the first part of the backlog; False if the ring has no room. A part that cannot be written as a record
        fails; the other parts are sent."""
        op, loading = part.flight.op, part.flight.op.kind is not OpKind.D2H
        whole = len(part.indices) == len(op)
        src, dst = (op.src, op.dst) if whole else (op.src[part.indices], op.dst[part.indices])
        slots, pages = (src, dst) if loading else (dst, src)
        if op.further_pages is not None:
            further = op.further_pages if whole else op.further_pages[:, part.indices]
            pages = np.concatenate([pages, further.ravel()])
        flags = part.flags | part.flight.cancelled * OpFlag.CANCELLED
        task_id, num_blocks = op.task_id, len(op)
        if op.part_of is not None:
            task_id, num_blocks = op.part_of.task_id, op.part_of.num_blocks
        try:
            if not self.rings.push_op(
                part.part_id, task_id, op.kind, op.fence, slots, pages, num_blocks, flags, op.counter,
                len(self._outstanding),
            ):
                return False
        except RingCorruptedError:
            raise
        except Exception as error:
            self._log.write(logging.ERROR, f"task {op.task_id} cannot be sent to {self.name}; its blocks fail", error)
            self._backlog.popleft()
            part.flight.answer(part.indices, np.zeros(len(part.indices), dtype=np.bool_))
            return True
        self._outstanding[part.part_id] = part
        self._backlog.popleft()
        return True

    def disconnect(self, reason: str, level: int = logging.ERROR) -> None:
        """Disconnect an agent that cannot be trusted, so that it ends. Its slots and pages stay reserved until then."""
        if not self._disconnected:
            self._disconnected = True
            logger.log(level, "%s: %s; it is disconnected", self.name, reason)
            with suppress(OSError):                          # the agent has closed the connection already
                self.connection.shutdown(socket.SHUT_WR)

    # ---- from the agent ---------------------------------------------------------------------------------------

    def drain_event(self) -> bool:
        """Read the agent's connection; True if the agent has left. The only valid message is a farewell.

        Raises
        ------
        RingCorruptedError
            The agent sent another message.
        """
        try:
            message = self.connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if message and message != FAREWELL:
            raise RingCorruptedError(f"a message of {len(message)} bytes where only a farewell is allowed")
        self.said_farewell = message == FAREWELL
        return True

    def has_left(self) -> bool:
        """Whether the agent has sent a farewell or hung up, which ``drain_event`` may not have read yet."""
        try:
            self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def end_exchange(self) -> None:
        """Have the rank unmap the memory of its peers, which would not be free until then."""
        self.exchange = 0
        self.rings.end_exchange()

    def clear_news(self) -> None:
        """Reset the eventfd with which the agent announces results."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.rings.receiving_event_fd)

    def drain(self) -> bool:
        """Collect the agent's results; True if there was any.

        If a result is impossible or cannot be processed, the agent is disconnected; other agents are not affected."""
        if self._disconnected:
            return False
        try:
            return self._drain()
        except RingCorruptedError as error:
            self.disconnect(str(error))
        except Exception as error:
            self._log.write(logging.ERROR, "a result of an agent could not be processed", error)
            self.disconnect(f"{type(error).__name__} in the controller")
        return False

    def _drain(self) -> bool:
        any_result = False
        while (result := self.rings.pop_result()) is not None:
            any_result = True
            part_id, first, ok, last = result
            part = self._outstanding.get(part_id)
            if part is None or first != part.answered or not 0 < len(ok) <= len(part.indices) - first:
                raise RingCorruptedError(f"a result for blocks {first} to {first + len(ok)} of part {part_id}")
            answered = first + len(ok)
            if last != (answered == len(part.indices)):
                raise RingCorruptedError(f"part {part_id} ends after {answered} of {len(part.indices)} blocks")
            part.flight.answer(part.rows(first, answered), ok)
            part.answered = answered
            if last:
                del self._outstanding[part_id]
        if any_result:
            self.flush()
        return any_result

    def fail_backlog(self) -> list[Part]:
        """Fail the parts that were never sent, and return them."""
        parts = list(self._backlog)
        self._backlog.clear()
        self._cancels.clear()
        self._fail(parts)
        return parts

    def lose(self) -> None:
        """Fail all blocks that the agent has not reported. It must not access any slot any more."""
        parts = list(self._outstanding.values())
        self._outstanding.clear()
        self._fail(parts)

    def _fail(self, parts: list[Part]) -> None:
        for part in parts:
            rest = part.indices[part.answered :]
            part.flight.op.is_lost = True
            try:
                part.flight.answer(rest, np.zeros(len(rest), dtype=np.bool_))
            except Exception as error:
                self._log.write(logging.ERROR, f"task {part.flight.op.task_id} cannot be failed", error)

    @property
    def ops(self) -> set[TransferOp]:
        """Ops with blocks that the agent may be moving."""
        return {part.flight.op for part in self._outstanding.values()}

    @property
    def healthy(self) -> bool:
        """Whether the agent's reports are trusted."""
        return not self._disconnected

    @property
    def busy(self) -> bool:
        """Whether the agent has parts without a result."""
        return bool(self._outstanding)

    def close(self) -> None:
        """Close the connection, the rings and the descriptor of the process, of an agent at rest."""
        self.is_at_rest = True
        self.connection.close()
        self.rings.close()
        self.process.close()
