"""Device executor: sends ops to the agents of the ranks, and collects their results."""

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.ring import OpFlag, OpKind
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.executors.agent_link import AgentLink, Flight, Part
from flexkv.transfer.executors.node_link import MissedOps
from flexkv.transfer.graph import TransferOp

_LOADS = frozenset({OpKind.H2D, OpKind.P2D, OpKind.STORE2D})
_SAVES = frozenset({OpKind.D2H, OpKind.D2STORE})
"""Kinds of ops that wait for fences of loads, and of saves."""

_EXCHANGE_BYTES = 16 << 20
"""Minimum number of bytes that a rank need not read over the bus in an exchange. They take 0.3 ms at 50 GB/s; the
results and ops between the steps of an exchange take 0.1 to 0.2 ms."""


def _consecutive(indices: NDArray[np.intp]) -> bool:
    """Whether each of one or more indices is one more than the index before it."""
    last = len(indices) - 1
    return int(indices[-1]) - int(indices[0]) == last and (
        last == 0 or bool(np.count_nonzero(indices[1:] > indices[:-1]) == last)
    )


class DeviceExecutor(Executor):
    """Moves blocks between host slots and the pages of the ranks of a data-parallel client.

    A load concerns all ranks; a save concerns the ranks that write a part of a slot. If a rank that an op concerns is
    missing, the op's blocks fail.
    """

    kinds = frozenset({OpKind.D2H, OpKind.H2D, OpKind.P2D})

    def __init__(self) -> None:
        self._ranks: dict[int, int] = {}                         # by client: connected or not
        self._links: dict[int, list[AgentLink]] = {}
        self._flights: dict[TransferOp, Flight] = {}
        self._part_ids = itertools.count(1)
        self._readers: dict[int, set[tuple[int, int]]] = {}      # ranks that write nothing, by client
        self._missed: dict[int, MissedOps] = {}                  # by client that has several nodes

    def expect(self, client: int, num_ranks: int, num_nodes: int = 1) -> None:
        """Record the number of ranks on this node, and of nodes, of a data-parallel client. They may connect from now
        on."""
        self._ranks[client] = num_ranks + num_nodes - 1
        if num_nodes > 1:
            self._missed[client] = MissedOps()

    def dismiss(self, client: int, reason: str) -> None:
        """Disconnect the ranks of a client: no more ranks of it connect, and no more ops of it come."""
        self._ranks.pop(client, None)
        for link in list(self._links.get(client, ())):
            link.disconnect(reason, logging.INFO)

    def caught_up(self, client: int) -> bool:
        """Whether all ranks and nodes of a client are connected, and can copy from and to the usable slots."""
        links = self._links.get(client, ())
        return len(links) == self._ranks.get(client, -1) and all(link.caught_up for link in links)

    def add(self, link: AgentLink) -> None:
        """Add an agent that has registered."""
        self._links.setdefault(link.hello.dp_client_id, []).append(link)
        if not link.writes:                          # kept when the rank leaves: saves go on without it
            self._readers.setdefault(link.hello.dp_client_id, set()).add((link.hello.pp_rank, link.hello.rank))
        if (missed := self._missed.get(link.hello.dp_client_id)) is not None:
            for op in missed.join(link):
                flight = Flight(op, lambda *_: None, np.ones(len(op), np.int16), np.zeros(len(op), np.bool_))
                self._send([link], flight, np.arange(len(op)), OpFlag.CANCELLED, True)

    def detach(self, link: AgentLink) -> None:
        """Send no more ops to an agent; parts that were not sent yet fail. Can be called again."""
        links = self._links.get(link.hello.dp_client_id, [])
        if link in links:
            links.remove(link)
            self._end_exchange(link, links)
        if not links and link.hello.dp_client_id not in self._ranks:         # none of its ranks will come again
            self._links.pop(link.hello.dp_client_id, None)
            self._readers.pop(link.hello.dp_client_id, None)
            self._missed.pop(link.hello.dp_client_id, None)
        unsent = link.fail_backlog()
        link.is_detached = True
        if (missed := self._missed.get(link.hello.dp_client_id)) is not None:
            missed.leave(link, {part.flight.op for part in unsent} | link.ops)

    @property
    def links(self) -> Iterable[AgentLink]:
        """Agents that are connected."""
        return [link for links in list(self._links.values()) for link in links]     # also read without the lock

    @property
    def nodes_are_present(self) -> bool:
        """Whether all ranks and nodes of each engine on several nodes are connected. Otherwise the pool must not grow:
        an absent node may have fewer slots."""
        return all(len(self._links.get(client, ())) >= self._ranks.get(client, 0) for client in list(self._missed))

    def links_of(self, client: int) -> Sequence[AgentLink]:
        """Connected agents of a client."""
        return tuple(self._links.get(client, ()))

    def reached(self, op: TransferOp) -> bool:
        """Whether every rank that the op concerns has finished the step of the op's fence, so that only the copies take
        time."""
        if not op.fence or op.kind not in _LOADS | _SAVES:
            return True
        links, _ = self._concerned(op)
        return all(link.rings.reached(op.kind in _LOADS) >= op.fence for link in links)

    def _concerned(self, op: TransferOp) -> tuple[list[AgentLink], float]:
        """Connected agents of the ranks that the op concerns, and the number of these ranks, connected or not; infinite
        if the client is not known, so that its ops fail."""
        links, readers = self._links.get(op.dp_client_id, []), self._readers.get(op.dp_client_id)
        num_ranks = self._ranks.get(op.dp_client_id, math.inf)
        if readers is None or op.kind in _LOADS:
            return links, num_ranks
        return [link for link in links if link.writes], num_ranks - len(readers)

    def exchange_of(self, client: int, num_blocks: int) -> int:
        """Number of the exchange in which a client's ranks can load, if ``num_blocks`` blocks are worth it; else 0. The
        answer may be outdated when an op is submitted, which then fails."""
        links = self.links_of(client)
        number = self._exchange_among(client, links)
        spared_bytes = max((link.spared_bytes for link in links), default=0) * num_blocks
        return number if number and spared_bytes >= _EXCHANGE_BYTES else 0

    def _exchange_among(self, client: int, links: Sequence[AgentLink]) -> int:
        """Number of the exchange of which all ranks of a client know one another's memory as it is now, or 0."""
        number = links[0].exchange if links else 0
        if not number or len(links) != self._ranks.get(client) or client in self._missed:
            return 0
        are_ready = all(
            link.exchange == number and link.healthy and link.caught_up and link.rings.exchanges for link in links
        )
        return number if are_ready else 0

    @staticmethod
    def _end_exchange(link: AgentLink, others: Sequence[AgentLink]) -> None:
        """End the exchange of a rank that has left."""
        number, link.exchange = link.exchange, 0
        for other in others:
            if number and other.exchange == number:
                other.end_exchange()

    def exchanging(self, client: int) -> list[TransferOp]:
        """Ops of a client's exchanges that run."""
        return [op for op in self._flights if op.exchange and op.dp_client_id == client and not op.done]

    @staticmethod
    def _arrived(
        links: Sequence[AgentLink], progress: Progress, op: TransferOp, indices: NDArray[np.intp] | slice,
        ok: NDArray[np.bool_],
    ) -> None:
        """Report blocks of the second step of an exchange. They have failed if one of the ranks has left: its pages may
        have been used again before its peers had read them."""
        if any(link.has_left() for link in links):
            op.is_lost = True
            ok = np.zeros_like(ok)
        progress(op, indices, ok)

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False) -> None:
        links, needed = self._concerned(op)
        links = [link for link in links if link.healthy]
        flight = self._flights.get(op)
        if flight is None:
            report = partial(self._arrived, links, progress) if op.kind is OpKind.P2D else progress
            flight = Flight(op, report, np.zeros(len(op), np.int16), np.ones(len(op), np.bool_))
            self._flights[op] = flight
        if sum(link.caught_up for link in links) < needed or (
            op.exchange and self._exchange_among(op.dp_client_id, links) != op.exchange
        ):
            failed = op.is_lost = True
        first = int(indices[0]) if _consecutive(indices) else -1
        rows = slice(first, first + len(indices)) if first >= 0 else indices
        if failed:
            flight.ok[rows] = False
        flight.missing[rows] = len(links)
        if op.dp_client_id in self._missed:
            self._missed[op.dp_client_id].record(op, links)
        if not links:
            progress(op, rows, flight.ok[rows])
            return
        flags = failed * OpFlag.CANCELLED | op.layerwise * OpFlag.LAYERWISE     # int: an IntFlag is slow to create
        flags |= (op.exchange > 0 and op.kind is OpKind.H2D) * OpFlag.SHARE
        complete = bool(np.count_nonzero(op.started) == len(op)) and not (op.part_of and op.part_of.has_more)
        self._send(links, flight, indices, flags, complete)

    def _send(
        self, links: Sequence[AgentLink], flight: Flight, indices: NDArray[np.intp], flags: int, complete: bool
    ) -> None:
        """Send blocks of an op to agents, in parts that fit a record; ``complete``: no others of the op follow."""
        first = int(indices[0]) if _consecutive(indices) else -1
        for link in links:
            for start in range(0, len(indices), link.rings.max_blocks):
                piece = indices[start : start + link.rings.max_blocks]
                last = complete and start + len(piece) == len(indices)
                part = Part(
                    next(self._part_ids), flight, piece, flags if last else flags | OpFlag.MORE,
                    first + start if first >= 0 else -1,
                )
                flight.parts.append(part)
                link.submit(part)

    def cancel(self, op: TransferOp) -> None:
        flight = self._flights.get(op)
        if flight is not None and not flight.cancelled:      # once: the ring has room for one cancel a part
            flight.cancelled = True
            for link in self._links.get(op.dp_client_id, []):
                link.cancel(flight)

    def forget(self, op: TransferOp) -> None:
        self._flights.pop(op, None)
