"""Messages of the handshake: a rank's segments and layer groups, and their places in a slot."""

import struct
from dataclasses import replace

import pytest

from flexkv.errors import RegistrationError
from flexkv.protocol.registration import (
    MAX_LAYER_GROUPS,
    MAX_MESSAGE_BYTES,
    MAX_SEGMENTS,
    Hello,
    Placement,
    SegmentClaim,
    SegmentKind,
    Welcome,
)
from tests.support.harness import hello_of

SHARD = SegmentClaim(SegmentKind.SHARD, 1024, bytes(16))
COPY = SegmentClaim(SegmentKind.REPLICA, 64, b"c" * 16, b"x" * 16)
WELCOME = Welcome(1 << 20, 4096, 256 + 4096, (Placement(1024, 64, 0, 0), Placement(0, 1024, 0, 1024)))


def test_messages_arrive_as_they_were_sent() -> None:
    many = tuple(replace(COPY, copy=bytes([n + 1] * 16)) for n in range(MAX_SEGMENTS))
    for hello in (hello_of(), hello_of(3, num_pages=(5, 6), segments=(SHARD, COPY, SHARD)),
                  hello_of(num_pages=tuple(range(1, 1 + MAX_LAYER_GROUPS)), segments=many)):
        assert Hello.unpack(hello.pack()) == hello
        assert len(hello.pack()) <= MAX_MESSAGE_BYTES
    assert Welcome.unpack(WELCOME.pack()) == WELCOME


@pytest.mark.parametrize(("hello", "reason"), [
    (hello_of(segments=()), "number of segments"),
    (hello_of(segments=(SHARD,) * (MAX_SEGMENTS + 1)), "number of segments"),
    (hello_of(num_pages=()), "number of layer groups"),
    (hello_of(num_pages=(1,) * (MAX_LAYER_GROUPS + 1)), "number of layer groups"),
    (hello_of(num_pages=(1, 0)), "num_pages"),
    (hello_of(segments=(SHARD, replace(COPY, segment_bytes=0))), "segment_bytes"),
    (hello_of(segments=(replace(COPY, copy=bytes(16)),)), "must name one"),
    (hello_of(segments=(replace(SHARD, copy=b"x" * 16),)), "must not"),
    (hello_of(segments=(COPY, SHARD, replace(COPY, segment_bytes=128))), "the same copy"),
    (hello_of(rank=-1), "rank"),
])
def test_a_hello_that_contradicts_itself_is_refused(hello: Hello, reason: str) -> None:
    with pytest.raises(RegistrationError, match=reason):
        Hello.unpack(hello.pack())


@pytest.mark.parametrize("kind", [0, 3, (1 << 32) - 1])
def test_an_unknown_kind_of_segment_is_refused(kind: int) -> None:
    message = bytearray(hello_of().pack())
    struct.pack_into("<I", message, len(message) - 48, kind)
    with pytest.raises(RegistrationError, match=f"kind {kind}: it must be SHARD"):
        Hello.unpack(bytes(message))


@pytest.mark.parametrize("cut", [1, 8, 47, 48, 60])
def test_other_lengths_and_versions_are_refused(cut: int) -> None:
    for kind, message in ((Hello, hello_of(segments=(SHARD, COPY)).pack()), (Welcome, WELCOME.pack())):
        for wrong in (message[:-cut], message + bytes(cut), b"FLEXKV03" + message[8:], b""):
            with pytest.raises(RegistrationError, match="same version"):
                kind.unpack(wrong)          # type: ignore[attr-defined]


@pytest.mark.parametrize(("places", "reason"), [
    ((), "number of segments"),
    ((Placement(0, 1024, 0, 1024), Placement(1000, 64, 0, 64)), "offset of a segment"),
    ((Placement(64, 64, 0, 64), Placement(64, 64, 0, 64)), "offset of a segment"),
    ((Placement(4096, 64, 0, 64),), "offset of a segment"),
    ((Placement((1 << 64) - 64, 64, 0, 64),), "offset of a segment"),
    ((Placement(0, 0, 0, 0),), "segment_bytes"),
    ((Placement(0, 5000, 0, 64),), "segment_bytes"),
    ((Placement(0, 64, 0, 65),), "write_stop"),
    ((Placement(0, 64, 33, 32),), "write_start"),
])
def test_a_welcome_with_impossible_segments_is_refused(places: tuple[Placement, ...], reason: str) -> None:
    with pytest.raises(RegistrationError, match=reason):
        Welcome.unpack(replace(WELCOME, placements=places).pack())
