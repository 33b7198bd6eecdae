"""Terms of exchanges: each byte of each copy is read by one rank, and each rank knows the memory of the others."""

import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.controller.exchanges import ExchangeTerms
from flexkv.controller.registry import Registry
from flexkv.protocol.exchange import Allocation, ExportedCopy, Exports
from flexkv.protocol.registration import Hello, SegmentClaim, SegmentKind
from flexkv.protocol.ring import OpKind
from flexkv.storage.layout import SlotLayout
from tests.support.harness import make_manager, until, wait_ready
from tests.support.segment_ranks import Kind, SegmentRank, SlotModel, exchange_of, move

LATENT = [Kind(20_000, copy="latent"), Kind(1_312, copy="indexer")]


def claim_of(name: str | None, size: int) -> SegmentClaim:
    if name is None:
        return SegmentClaim(SegmentKind.SHARD, size, bytes(16))
    return SegmentClaim(SegmentKind.REPLICA, size, bytes(16), name.encode().ljust(16, b"."))


def hello_with(rank: int, segments: Sequence[tuple[str | None, int]], num_tensors: int = 1) -> Hello:
    claims = tuple(claim_of(*segment) for segment in segments)
    copies = tuple(ExportedCopy(claim.copy, bytes(16), ((0, 0),) * num_tensors) for claim in claims if any(claim.copy))
    exports = Exports(bytes([rank]) * 16, bytes(16), (Allocation(bytes(64), 4096, 4096),), copies) if copies else None
    return Hello(0, 0, rank, 1, (4,), claims, exports)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=3, unique=True), min_size=1,
                max_size=8), st.sampled_from([None, 0, 3]))
def test_each_byte_of_each_copy_is_read_by_one_rank(names: list[list[str | None]], writer: int | None) -> None:
    """Whichever ranks write."""
    sizes = {"a": 100, "b": 40_000, "c": 8192, None: 300}
    hellos = dict(enumerate(hello_with(rank, [(name, sizes[name]) for name in mine])
                            for rank, mine in enumerate(names)))
    layout = SlotLayout.of(list(hellos.values()), writer)
    terms = ExchangeTerms(True).of(layout, hellos)
    shared = [name for name in "abc" if sum(name in mine for mine in names) > 1]
    assert len(terms) == (len(names) if shared else 0)
    readers: dict[str, np.ndarray] = {name: np.full(sizes[name], -1) for name in shared}
    for rank, term in terms.items():
        assert term.number == 1
        spared = 0
        for share in term.exchange.shares:
            readers[str(names[rank][share.segment])][share.start : share.stop] = rank
        for peer in term.exchange.peers:
            assert peer.exports == hellos[peer.rank].exports
            spared += sum(share.stop - share.start for share in peer.shares)
        assert term.spared_bytes == spared
    for rank, term in terms.items():
        for peer in term.exchange.peers:
            for share in peer.shares:
                assert (readers[str(names[rank][share.segment])][share.start : share.stop] == peer.rank).all()
    assert all((ranks >= 0).all() for ranks in readers.values())


def test_ranks_that_are_not_welcomed_together_have_no_exchange(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    hellos = {rank: hello_with(rank, [("a", 9000)]) for rank in range(3)}
    layout, terms = SlotLayout.of(list(hellos.values())), ExchangeTerms(True)
    assert {term.number for term in terms.of(layout, hellos).values()} == {1}
    one = {1: hellos[1]}
    assert terms.needs_more(layout, one)
    assert not terms.needs_more(layout, hellos)
    for _ in range(2):
        assert terms.of(layout, one) == {}
    assert caplog.text.count("a rank has registered again") == 1
    assert {term.number for term in terms.of(layout, hellos).values()} == {2}


def test_no_exchange_without_the_memory_of_each_rank(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    hellos = {0: hello_with(0, [("a", 9000)]), 1: Hello(0, 0, 1, 1, (4,), (claim_of("a", 9000),))}
    layout, terms = SlotLayout.of(list(hellos.values())), ExchangeTerms(True)
    assert terms.of(layout, hellos) == {}
    assert "does not share its memory" in caplog.text
    assert not terms.needs_more(layout, {1: hellos[1]})      # it would be in vain
    assert ExchangeTerms(False).of(layout, hellos) == {}
    assert "exchange_copies is off" in caplog.text


def test_no_exchange_with_more_peers_than_a_message_may_have() -> None:
    hellos = {rank: hello_with(rank, [("a", 66 * 4096)]) for rank in range(66)}
    assert ExchangeTerms(True).of(SlotLayout.of(list(hellos.values())), hellos) == {}


def test_no_exchange_if_its_message_would_be_too_large(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    hellos = {rank: hello_with(rank, [("a", 200_000)], 1000) for rank in range(12)}
    assert ExchangeTerms(True).of(SlotLayout.of(list(hellos.values())), hellos) == {}
    assert "too many ranks or tensors" in caplog.text


@pytest.mark.parametrize("segments", [[("a", 9000)], [(None, 9000)]])
def test_no_exchange_without_copies_of_several_ranks(segments: list[tuple[str | None, int]]) -> None:
    hellos = {0: hello_with(0, segments), 1: hello_with(1, [(None, 5)])}
    layout = SlotLayout.of(list(hellos.values()))
    assert ExchangeTerms(True).of(layout, hellos) == {}
    assert not ExchangeTerms(True).needs_more(layout, {0: hellos[0]})


def test_a_rank_that_is_not_welcomed_leaves_its_peers_without_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers have got their WELCOME with its memory, which they must not keep mapped."""
    make_link, refused = Registry._make_link, list[Any]()

    def refuse_once(registry: Registry, rank_id: Any, terms: Any) -> Any:
        if rank_id == (0, 1) and not refused:
            refused.append(terms)
            raise OSError(errno.EMFILE, "no descriptor")
        return make_link(registry, rank_id, terms)

    monkeypatch.setattr(Registry, "_make_link", refuse_once)
    manager = make_manager(tmp_path / "s", 8, 2)
    ranks = [SegmentRank(tmp_path / "s", number, LATENT, [8, 8]) for number in range(2)]
    try:
        for rank in ranks:
            rank.register()
        until(lambda: ranks[0].client._agent is not None and ranks[1].client.error is not None)
        assert refused != [None]
        agent = ranks[0].client._agent
        until(lambda: agent is not None and not agent.has_peers)
        ranks[1] = SegmentRank(tmp_path / "s", 1, LATENT, [8, 8])
        ranks[1].register()
        wait_ready(manager, 8)
        assert exchange_of(manager) == 0
        for rank in ranks:
            rank.fill(1)
        model = SlotModel(ranks, 8)
        for kind, pages in ((OpKind.D2H, [0, 1]), (OpKind.H2D, [4, 5])):
            assert move(manager, kind, [2, 3], [pages]).all()
            model.move(kind, [2, 3], [pages])
        model.check()
    finally:
        manager.shutdown()
        for rank in ranks:
            rank.client.close()
