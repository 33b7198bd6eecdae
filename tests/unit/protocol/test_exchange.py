"""Messages about memory that ranks read of one another: round trips, and refusal of all that contradicts itself."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import RegistrationError
from flexkv.protocol.exchange import (
    MAX_EXCHANGE_BYTES,
    MAX_EXPORT_BYTES,
    Allocation,
    Exchange,
    ExportedCopy,
    Exports,
    Peer,
    Share,
)
from flexkv.protocol.registration import Hello, SegmentClaim, SegmentKind, Welcome
from tests.fuzz.rounds import mutated
from tests.unit.protocol.test_registration import WELCOME

IPC = bytes(range(64))
EXPORTS = Exports(
    b"p" * 16, b"g" * 16, (Allocation(IPC, 1 << 40, 1 << 30), Allocation(IPC, 4096, 100)),
    (ExportedCopy(b"a" * 16, b"l" * 16, ((0, 0), (1, 99))), ExportedCopy(b"b" * 16, b"m" * 16, ((0, 512),))),
)
SIZES = [64, 1024]
EXCHANGE = Exchange((Share(1, 0, 100),), (
    Peer(3, (Share(1, 100, 1024),), EXPORTS), Peer(4, (Share(0, 0, 64),), replace(EXPORTS, process=b"q" * 16)),
))


def test_messages_come_back() -> None:
    assert Exports.unpack(EXPORTS.pack()) == EXPORTS
    assert Exchange.unpack(EXCHANGE.pack(), SIZES) == EXCHANGE
    assert Exchange.unpack(Exchange((), ()).pack(), SIZES) == Exchange((), ())
    welcome = replace(WELCOME, exchange=EXCHANGE)
    assert Welcome.unpack(welcome.pack()) == welcome
    claims = tuple(SegmentClaim(SegmentKind.REPLICA, 64, bytes(16), letter * 16) for letter in (b"a", b"b"))
    hello = Hello(0, 0, 1, 5, (7,), claims, EXPORTS)
    assert Hello.unpack(hello.pack()) == hello
    assert EXPORTS.copy(b"b" * 16) == EXPORTS.copies[1]
    assert EXPORTS.copy(b"c" * 16) is None


@pytest.mark.parametrize("copies", [
    (), (ExportedCopy(b"a" * 16, bytes(16), ()),), (ExportedCopy(b"a" * 16, bytes(16), ((2, 0),)),),
    (ExportedCopy(b"a" * 16, bytes(16), ((1, 100),)),), (EXPORTS.copies[0], EXPORTS.copies[0]),
    tuple(ExportedCopy(bytes([number]) * 16, bytes(16), ((0, 0),)) for number in range(9)),
])
def test_copies_outside_of_their_allocations_are_refused(copies: tuple[ExportedCopy, ...]) -> None:
    with pytest.raises(RegistrationError):
        Exports.unpack(replace(EXPORTS, copies=copies).pack())


@pytest.mark.parametrize("allocation", [Allocation(IPC, 5, 0), Allocation(IPC, (1 << 64) - 8, 9)])
def test_impossible_allocations_are_refused(allocation: Allocation) -> None:
    with pytest.raises(RegistrationError):
        Exports.unpack(replace(EXPORTS, allocations=(EXPORTS.allocations[0], allocation)).pack())


def test_exports_of_a_copy_that_is_not_declared_are_refused() -> None:
    claim = SegmentClaim(SegmentKind.REPLICA, 64, bytes(16), b"a" * 16)
    with pytest.raises(RegistrationError, match="does not declare"):
        Hello.unpack(Hello(0, 0, 1, 5, (7,), (claim,), EXPORTS).pack())


@pytest.mark.parametrize("shares", [
    [(1, 0, 1023)], [(1, 1, 1024)], [(1, 0, 1025)], [(1, 0, 500), (1, 501, 1024)], [(1, 0, 500), (1, 499, 1024)],
    [(1, 0, 1024), (1, 0, 1024)], [(2, 0, 64)], [(0, 0, 0), (0, 0, 64)], [(0, 0, 64), (0, 64, 64)], [(0, 64, 0)],
])
def test_shares_that_do_not_make_the_segment_are_refused(shares: list[tuple[int, int, int]]) -> None:
    """A gap would leave bytes of the pages unwritten."""
    first, *others = [Share(*numbers) for numbers in shares]
    for exchange in (Exchange((first, *others), ()), Exchange((first,), (Peer(3, tuple(others), EXPORTS),))):
        with pytest.raises(RegistrationError):
            Exchange.unpack(exchange.pack(), SIZES)


def test_messages_have_a_maximum_size() -> None:
    many = ExportedCopy(b"a" * 16, bytes(16), ((0, 0),) * (MAX_EXPORT_BYTES // 16))
    with pytest.raises(RegistrationError, match="at most"):
        Exports.unpack(replace(EXPORTS, copies=(many,)).pack())
    with pytest.raises(RegistrationError, match="at most"):
        Exchange.unpack(bytes(MAX_EXCHANGE_BYTES + 1), SIZES)
    with pytest.raises(RegistrationError, match="peers"):
        Exchange.unpack(Exchange((), EXCHANGE.peers * 33).pack(), SIZES)


@given(st.integers(0, 1 << 32), st.integers(0, 2))
def test_damage_is_refused_or_makes_another_valid_message(seed: int, which: int) -> None:
    rng = random.Random(seed)
    message = mutated(rng, [EXPORTS.pack(), EXCHANGE.pack(), rng.randbytes(rng.randrange(400))][which])
    try:
        if which == 0:
            exports = Exports.unpack(message)
            assert all(offset < exports.allocations[number].num_bytes
                       for copy in exports.copies for number, offset in copy.tensors)
            return
        exchange = Exchange.unpack(message, SIZES)
    except RegistrationError:
        return
    covered = [bytearray(size) for size in SIZES]
    for share in [*exchange.shares, *(share for peer in exchange.peers for share in peer.shares)]:
        for byte in range(share.start, share.stop):
            covered[share.segment][byte] += 1
    assert all(set(counts) in ({0}, {1}) for counts in covered)
