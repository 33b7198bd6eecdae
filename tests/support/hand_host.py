"""A storage host that is driven by hand, for tests of the controller's side."""

import select
import socket
import time

import numpy as np

from flexkv.protocol.node_frames import CHALLENGE_BYTES, PROOF_BYTES, Frames, Greeting
from flexkv.protocol.nodes import FrameKind, Join, NodeOp, Terms, pack_json, pack_number, pack_result, parse_terms

RANKS = ((0, 1),)


class HandHost:
    """Connects and authenticates; then says what the test says. Answers PINGs whenever it waits."""

    def __init__(self, port: int, secret: str) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), 5.0)
        self.connection.settimeout(5.0)
        greeting = Greeting(secret)
        try:
            self.connection.sendall(greeting.reply_to(self._read(CHALLENGE_BYTES)))
            greeting.check(self._read(PROOF_BYTES))
        except Exception:
            self.connection.close()
            raise
        self.connection.setblocking(False)
        to_host, to_controller = greeting.keys()
        self.frames = Frames(self.connection, to_controller, to_host)
        kind, payload = self.next()
        assert kind is FrameKind.TERMS
        self.terms: Terms = parse_terms(payload)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.connection.recv(size - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def next(self, timeout_s: float = 5.0) -> tuple[FrameKind, bytes]:
        """The next frame that is no PING; ConnectionError if the controller has hung up, TimeoutError after the
        time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (frame := self.frames.receive()) is None:
                if self.frames.has_ended():
                    raise ConnectionError
                poll = select.poll()
                poll.register(self.connection, select.POLLIN)
                poll.poll(50)
            elif frame[0] is FrameKind.PING:
                self.frames.push(FrameKind.PONG)
            else:
                return frame
        raise TimeoutError

    def join(
        self, ranks: tuple[tuple[int, int], ...] = RANKS, incarnation: str = "a", usable: int = 48,
        num_pages: tuple[int, ...] = (64,), num_slots: int = 48,
    ) -> None:
        self.frames.push(FrameKind.JOIN, pack_json(Join(incarnation, ranks, num_pages, num_slots)))
        self.frames.push(FrameKind.USABLE, pack_number(usable))

    def next_op(self, timeout_s: float = 5.0) -> NodeOp:
        kind, payload = self.next(timeout_s)
        assert kind is FrameKind.OP
        return NodeOp.unpack(payload)

    def answer(self, op: NodeOp, ok: bool = True) -> None:
        self.frames.push(FrameKind.RESULT, pack_result(op.part_id, np.full(len(op.slots), ok)))

    def has_been_dropped(self) -> bool:
        """Whether the controller closes the connection, and sends nothing else before."""
        try:
            self.next(5.0)
        except ConnectionError:
            return True
        return False

    def close(self) -> None:
        self.connection.close()
