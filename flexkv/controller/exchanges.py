"""Terms of exchanges: which ranks of an engine read parts of copies for one another, and from which memory."""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flexkv.protocol.exchange import MAX_EXCHANGE_BYTES, MAX_PEERS, Exchange, Exports, Peer
from flexkv.protocol.registration import Hello
from flexkv.storage.layout import SlotLayout

logger = logging.getLogger("flexkv.controller")


@dataclass(frozen=True)
class RankTerms:
    """Terms of one rank in an exchange.

    Attributes
    ----------
    number : int
        Number of the exchange, from 1. Each set of ranks that are welcomed together has its own number, because a rank
        that registers again has other memory.
    exchange : Exchange
        For the rank's WELCOME; empty if the rank shares no copy.
    spared_bytes : int
        Bytes of a block that the rank does not read from host memory.
    """

    number: int
    exchange: Exchange
    spared_bytes: int


def _has_copies(layout: SlotLayout) -> bool:
    return any(len(segment.readers) > 1 for segment in layout.segments)


class ExchangeTerms:
    """Makes the terms of the ranks of one engine.

    Parameters
    ----------
    is_allowed : bool
        False: there are no exchanges.
    """

    def __init__(self, is_allowed: bool) -> None:
        self._is_allowed = is_allowed
        self._numbers = itertools.count(1)
        self._logged = ""

    def _is_possible(self, layout: SlotLayout) -> bool:
        return self._is_allowed and _has_copies(layout)

    def needs_more(self, layout: SlotLayout, hellos: Mapping[int, Hello]) -> bool:
        """Whether ranks should wait for the other ranks of the engine: if they were welcomed before, there would be no
        exchange. ``hellos``: those of the ranks that wait, by their index in the layout."""
        offered = all(self._exports(layout, index, hello) is not None for index, hello in hellos.items())
        return len(hellos) < len(layout.held) and self._is_possible(layout) and offered

    def of(self, layout: SlotLayout, hellos: Mapping[int, Hello]) -> dict[int, RankTerms]:
        """Make the terms of the ranks that are welcomed together, by their index in the layout. Empty: there is no
        exchange, and each rank reads all of its segments from host memory."""
        if not self._is_possible(layout):
            if not self._is_allowed and _has_copies(layout):
                self._log("exchange_copies is off, or the engine is on several nodes")
            return {}
        if len(hellos) < len(layout.held):
            self._log("a rank has registered again, and others have not")
            return {}
        exports = {index: self._exports(layout, index, hello) for index, hello in hellos.items()}
        if None in exports.values():
            self._log("a rank does not share its memory; its log has the reason")
            return {}
        number = next(self._numbers)
        terms = {index: self._terms(layout, number, index, hellos, exports) for index in hellos}
        if any(len(term.exchange.peers) > MAX_PEERS or len(term.exchange.pack()) > MAX_EXCHANGE_BYTES
               for term in terms.values()):
            self._log("there are too many ranks or tensors")
            return {}
        self._logged = ""
        return terms

    def _log(self, reason: str) -> None:
        if reason != self._logged:
            logger.info("each rank loads equal KV whole from host memory: %s", reason)
        self._logged = reason

    @staticmethod
    def _exports(layout: SlotLayout, index: int, hello: Hello) -> Exports | None:
        """Exports of a rank; None if they lack a copy that a peer shares."""
        shared = [layout.segments[held].claim.copy for held in layout.held[index]
                  if len(layout.segments[held].readers) > 1]
        if not shared:
            return Exports(bytes(16), bytes(16), (), ())
        exports = hello.exports
        return exports if exports is not None and all(exports.copy(copy) for copy in shared) else None

    @staticmethod
    def _terms(
        layout: SlotLayout, number: int, index: int, hellos: Mapping[int, Hello], exports: Mapping[int, Exports | None]
    ) -> RankTerms:
        shares = layout.shares(index)
        mine = shares.pop(index, ())
        peers = []
        for other, theirs in shares.items():
            exported = exports[other]
            assert exported is not None  # narrowing: the caller has checked it
            peers.append(Peer(hellos[other].rank, theirs, exported))
        spared_bytes = sum(share.stop - share.start for theirs in shares.values() for share in theirs)
        return RankTerms(number, Exchange(mine, tuple(peers)), spared_bytes)
