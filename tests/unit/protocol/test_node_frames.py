"""Frames between nodes: only those who know the secret are heard, and a frame is heard once, in order, unchanged."""

import socket
from collections.abc import Iterator

import pytest

from flexkv.errors import NodeLinkError
from flexkv.protocol.node_frames import CHALLENGE_BYTES, PROOF_BYTES, REPLY_BYTES, Frames, Greeting
from flexkv.protocol.nodes import MAX_PAYLOAD_BYTES, FrameKind


def greet(secret: str, other: str) -> tuple[Greeting, Greeting]:
    controller, host = Greeting(secret), Greeting(other)
    challenge = controller.challenge()
    reply = host.reply_to(challenge)
    assert (len(challenge), len(reply)) == (CHALLENGE_BYTES, REPLY_BYTES)
    answer = controller.answer_to(reply)
    assert len(answer) == PROOF_BYTES
    host.check(answer)
    return controller, host


@pytest.fixture
def ends() -> Iterator[tuple[Frames, Frames, socket.socket, socket.socket]]:
    controller, host = greet("s", "s")
    a, b = socket.socketpair()
    for end in (a, b):
        end.setblocking(False)
    to_host, to_controller = controller.keys()
    assert host.keys() == (to_host, to_controller)
    yield Frames(a, to_host, to_controller), Frames(b, to_controller, to_host), a, b
    a.close()
    b.close()


def test_another_secret_is_refused() -> None:
    with pytest.raises(NodeLinkError, match="node_secret"):
        greet("one", "another")


def test_the_controller_must_know_it_too() -> None:
    host = Greeting("s")
    host.reply_to(Greeting("s").challenge())
    with pytest.raises(NodeLinkError, match="node_secret"):
        host.check(bytes(PROOF_BYTES))


def test_another_protocol_is_refused() -> None:
    with pytest.raises(NodeLinkError, match="version"):
        Greeting("s").reply_to(b"HTTP/1.1 400 Bad Request".ljust(CHALLENGE_BYTES))


def test_a_proof_is_good_for_one_connection() -> None:
    first, second = Greeting("s"), Greeting("s")
    reply = Greeting("s").reply_to(first.challenge())
    with pytest.raises(NodeLinkError):
        second.answer_to(reply)


def test_frames_arrive_in_order(ends: tuple[Frames, Frames, socket.socket, socket.socket]) -> None:
    a, b, _, _ = ends
    sent = [(FrameKind.OP, bytes([i]) * i * 1000) for i in range(50)]
    got = []
    for kind, payload in sent:
        a.push(kind, payload)
        while (frame := b.receive()) is not None:
            got.append(frame)
    while not a.flush() or len(got) < len(sent):
        while (frame := b.receive()) is not None:
            got.append(frame)
    assert got == sent
    assert a.receive() is None


def test_the_end_is_noticed_after_the_last_frame(ends: tuple[Frames, Frames, socket.socket, socket.socket]) -> None:
    a, b, raw, _ = ends
    a.push(FrameKind.PING)
    raw.shutdown(socket.SHUT_WR)
    assert not b.has_ended()
    assert b.receive() == (FrameKind.PING, b"")
    assert b.has_ended()
    raw.close()
    b.push(FrameKind.PONG)
    b.push(FrameKind.PONG)                           # the second finds the connection broken
    assert b.flush()


@pytest.mark.parametrize("at", [0, 4, 8, 23, 24, 40])
def test_a_changed_frame_is_refused(
    ends: tuple[Frames, Frames, socket.socket, socket.socket], at: int
) -> None:
    a, b, _, theirs = ends
    a.push(FrameKind.RESULT, bytes(64))
    raw = bytearray(theirs.recv(1000))
    raw[at] ^= 1
    third, fourth = socket.socketpair()
    with third, fourth:
        fourth.setblocking(False)
        third.sendall(raw + bytes(64))
        b.connection = fourth
        with pytest.raises(NodeLinkError):
            b.receive()
        b.connection = theirs


def test_a_repeated_frame_is_refused(ends: tuple[Frames, Frames, socket.socket, socket.socket]) -> None:
    a, b, raw, theirs = ends
    a.push(FrameKind.CANCEL, bytes(8))
    copy = theirs.recv(1000)
    raw.sendall(copy + copy)
    assert b.receive() == (FrameKind.CANCEL, bytes(8))
    with pytest.raises(NodeLinkError, match="tagged"):
        b.receive()


def test_a_frame_that_is_too_long_is_refused_before_it_is_read(
    ends: tuple[Frames, Frames, socket.socket, socket.socket]
) -> None:
    _, b, raw, _ = ends
    raw.sendall((3).to_bytes(4, "little") + (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(NodeLinkError, match="bytes"):
        b.receive()
