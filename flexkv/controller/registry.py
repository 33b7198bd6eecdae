"""Registration of ranks: from a connection to an agent that takes ops."""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from flexkv._core.device.ring import ControllerRings
from flexkv.at_fork import close_in_children
from flexkv.controller.exchanges import ExchangeTerms, RankTerms
from flexkv.errors import FlexKVError, RegistrationError
from flexkv.protocol.peer_process import PeerProcess, peer_credentials
from flexkv.protocol.registration import MAX_HELLO_BYTES, MAX_MESSAGE_BYTES, Hello, Welcome, pack_refusal
from flexkv.protocol.requests import is_request
from flexkv.protocol.sockets import ListeningSocket
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout, check_agreement
from flexkv.storage.ssd.gds_queue import GdsEnd
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.repeated_log import RepeatedLog
from flexkv.transfer.watch import Watch

logger = logging.getLogger("flexkv.controller")

RankId = tuple[int, int]
"""pp_rank, rank."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""``accept`` fails, and the listener stays readable."""

_PAUSE_S = 0.5
"""Pause of the listener while the process is out of descriptors or memory, and of one whose handler failed."""

_BATCH = 64
"""Connections accepted at a time: the backlog of the listener."""


class Registry:
    """Registers the ranks of one engine. When all ranks have sent their HELLO, it fixes the slot layout, gets the host
    pool, and sends each rank its WELCOME.

    A rank whose process has ended can register again. All methods must be called on the data plane's background thread.
    A fault of one connection closes that connection alone.

    Parameters
    ----------
    watch : Watch
        Watch that calls the handlers of the listening socket and the connections.
    listening : ListeningSocket
        The registry closes it.
    client : int
        Number of the engine in the data plane; the links that the registry makes have it.
    dp_client_id : int
        Data-parallel rank of the engine, as its ranks name it.
    num_ranks : int
    make_pool : callable
        ``make_pool(layout) -> HostPool``; called once, unless it fails.
    handshake_timeout_s : float
        Seconds after which a connection without a first message is closed.
    ring_bytes : int
        Data bytes of each ring; a power of two.
    on_link : callable
        ``on_link(link)``, called with the AgentLink of each rank that was sent its WELCOME; takes ownership.
    on_gds : callable, optional
        ``on_gds(end)``, called with the controller's end of each rank's socket for GPUDirect Storage; takes ownership.
        None: ranks get no such socket.
    on_control : callable
        ``on_control(message, descriptors) -> reply``: executes a user's request.
    first_task : int
        The engine's task ids are larger.
    writer : int, optional
        As in ``SlotLayout.of``.
    exchanges : bool
        Whether ranks that share copies may read one another's memory.
    """

    def __init__(
        self,
        watch: Watch,
        listening: ListeningSocket,
        client: int,
        dp_client_id: int,
        num_ranks: int,
        make_pool: Callable[[SlotLayout], HostPool],
        handshake_timeout_s: float,
        ring_bytes: int,
        on_link: Callable[[AgentLink], None],
        on_control: Callable[[bytes, Sequence[int]], bytes],
        on_gds: Callable[[GdsEnd], None] | None = None,
        first_task: int = 0,
        writer: int | None = None,
        exchanges: bool = False,
    ) -> None:
        self._watch = watch
        self._client = client
        self._dp_client_id = dp_client_id
        self._ranks = num_ranks
        self._first_task = first_task
        self._writer = writer
        self._exchanges = ExchangeTerms(exchanges)
        self._make_pool = make_pool
        self._timeout_s = handshake_timeout_s
        self._ring_bytes = ring_bytes
        self._on_link = on_link
        self._on_control = on_control
        self._on_gds = on_gds
        self._silent: dict[int, tuple[socket.socket, float]] = {}       # by descriptor: until when
        self._is_timed = False                                          # a timer for the silent ones is set
        self._waiting: dict[RankId, tuple[socket.socket, Hello]] = {}   # for the others
        self._connected: set[RankId] = set()
        self._index: dict[RankId, int] = {}                             # fixed with the layout
        self._layout: SlotLayout | None = None
        self._num_groups = 0
        self._pool: HostPool | None = None
        self._last_refusal = ""
        self._log = RepeatedLog(logger)
        self._listening = listening
        self.listener = self._listening.socket
        watch.add(self.listener.fileno(), self.accept, lambda error: watch.pause(self.listener.fileno(), _PAUSE_S))

    def accept(self) -> None:
        """Accept new connections, up to ``_BATCH``, and watch them for their first message. Does not block."""
        for _ in range(_BATCH):
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._log.write(logging.WARNING, f"a rank or user cannot connect: {error.strerror or error}")
                if error.errno in _EXHAUSTED:
                    self._watch.pause(self.listener.fileno(), _PAUSE_S)
                    return
                continue
            try:
                self._take(connection)
            except BaseException:
                connection.close()
                raise

    def _take(self, connection: socket.socket) -> None:
        close_in_children(connection)
        _, uid = peer_credentials(connection)
        if uid not in (os.getuid(), 0):
            self._log.write(logging.ERROR, f"refused a connection from user {uid}")
            connection.close()
            return
        connection.setblocking(False)
        fd = connection.fileno()
        self._watch.add(fd, partial(self._read, connection), lambda error: self._drop(connection))
        self._silent[fd] = (connection, time.monotonic() + self._timeout_s)
        self._set_timer()

    def _drop(self, connection: socket.socket) -> None:
        """Close a connection that is no agent's. May be repeated."""
        fd = connection.fileno()
        if fd >= 0:
            self._silent.pop(fd, None)
            for rank_id in [rank_id for rank_id, (other, _) in self._waiting.items() if other is connection]:
                del self._waiting[rank_id]
            self._watch.remove(fd)
            connection.close()

    def _read(self, connection: socket.socket) -> None:
        """A connection said its HELLO, or a user's request, or hung up."""
        if connection.fileno() in self._silent:
            self._listen_to(connection)
            return
        with suppress(BlockingIOError):              # one call too many is allowed
            connection.recv(MAX_MESSAGE_BYTES)
            logger.info("a rank has left before all ranks were registered")
            self._drop(connection)

    def _listen_to(self, connection: socket.socket) -> None:
        """Take the first message. The connection of a rank stays, others are closed."""
        fds: list[int] = []
        stays = False
        try:
            message, fds, _, _ = socket.recv_fds(connection, MAX_HELLO_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            if is_request(message):
                self._answer(connection, message, fds)
            elif message:
                self._admit(connection, Hello.unpack(message))
                stays = True
        except BlockingIOError:
            stays = True                             # one call too many is allowed
        except OSError as error:
            self._log.write(logging.WARNING, f"a rank's or user's connection broke: {error}")
        except RegistrationError as error:
            self._refuse(connection, str(error))
        finally:
            for fd in fds:
                os.close(fd)
            if not stays:
                self._drop(connection)

    def _answer(self, connection: socket.socket, message: bytes, fds: Sequence[int]) -> None:
        reply = self._on_control(message, fds)
        with suppress(BlockingIOError):              # it fits a socket's buffer, unless the user has filled that
            connection.send(reply)

    def _set_timer(self) -> None:
        """Have the connection that was accepted first dropped in time."""
        if self._silent and not self._is_timed:
            until = min(until for _, until in self._silent.values())
            self._is_timed = True
            self._watch.after(until - time.monotonic(), self._drop_silent)

    def _drop_silent(self) -> None:
        """Close connections that have said nothing in time."""
        self._is_timed = False
        now = time.monotonic()
        for connection, until in list(self._silent.values()):
            if until <= now:
                self._log.write(logging.WARNING, f"a connection said nothing for {self._timeout_s:g} s; dropped")
                self._drop(connection)
        self._set_timer()

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        self._last_refusal = reason
        self._log.write(logging.ERROR, f"refused a rank: {reason}")
        try:
            connection.send(pack_refusal(reason))
        except OSError as error:
            logger.debug("the refused rank is gone: %s", error)

    def _admit(self, connection: socket.socket, hello: Hello) -> None:
        rank_id = (hello.pp_rank, hello.rank)
        if hello.dp_client_id != self._dp_client_id:
            raise RegistrationError(f"dp_client_id {hello.dp_client_id} is not served here; it is {self._dp_client_id}")
        hello = replace(hello, dp_client_id=self._client)
        if rank_id in self._connected or rank_id in self._waiting:
            raise RegistrationError(f"rank {rank_id} is registered already: give each its own intra_client_id")
        if self._layout is not None:
            index = self._index.get(rank_id)
            sizes = [claim.segment_bytes for claim in hello.segments]
            known = () if index is None else self._layout.claims(index)
            if [claim.segment_bytes for claim in known] != sizes or len(hello.num_pages) != self._num_groups:
                raise RegistrationError(
                    f"rank {rank_id} with segments of {sizes} bytes a block in {len(hello.num_pages)} layer groups "
                    "does not fit the pool"
                )
            if known != hello.segments:
                raise RegistrationError(
                    f"rank {rank_id} registered tensors of different shapes; the cached KV does not match: "
                    "start a new KVManager"
                )
        check_agreement([*(other for _, other in self._waiting.values()), hello])
        self._silent.pop(connection.fileno(), None)
        self._waiting[rank_id] = (connection, hello)
        if self._layout is None and len(self._waiting) == self._ranks:
            try:
                self._fix_layout()
            except Exception as error:
                self._refuse_all(error)
        if self._layout is not None:
            self._welcome_all(self._layout)

    def _welcome_all(self, layout: SlotLayout) -> None:
        """Welcome the ranks that wait, unless further ranks must come before, for an exchange with these."""
        welcomable = list(self._welcomable())
        hellos = {self._index[rank_id]: self._waiting[rank_id][1] for rank_id in welcomable}
        if not self._connected and self._exchanges.needs_more(layout, hellos):
            return
        terms = self._exchanges.of(layout, hellos)
        links = [self._welcome(rank_id, terms.get(self._index[rank_id])) for rank_id in welcomable]
        if terms and None in links:                  # the others would keep the memory of that rank mapped
            for link in filter(None, links):
                link.end_exchange()

    def _refuse_all(self, error: Exception) -> None:
        """There is no host pool: no rank that waits for it can be welcomed."""
        if not isinstance(error, (FlexKVError, OSError, MemoryError)):
            self._log.write(logging.ERROR, "the host pool cannot be made", error)
        for connection, _ in list(self._waiting.values()):
            self._refuse(connection, f"the controller has no host pool: {error}")
            self._drop(connection)

    def _welcomable(self) -> Iterator[RankId]:
        return (rank_id for rank_id in self._waiting if rank_id in self._index)

    def _fix_layout(self) -> None:
        hellos = [self._waiting[rank_id][1] for rank_id in sorted(self._waiting)]
        layout = SlotLayout.of(hellos, self._writer)
        self._pool = self._make_pool(layout)
        self._layout, self._num_groups = layout, len(hellos[0].num_pages)
        self._index = {rank_id: index for index, rank_id in enumerate(sorted(self._waiting))}

    def _welcome(self, rank_id: RankId, terms: RankTerms | None) -> AgentLink | None:
        """Send a rank its WELCOME, and return the link; a rank for which there is no memory or descriptor is
        refused."""
        connection, hello = self._waiting[rank_id]
        try:
            link, gds = self._make_link(rank_id, terms)
        except BrokenPipeError as error:
            logger.info("rank %s has left before it was welcomed: %s", rank_id, error.strerror)
            self._drop(connection)
        except (OSError, MemoryError) as error:
            self._refuse(connection, f"rank {rank_id} cannot be welcomed: {error}")
            self._drop(connection)
        else:
            del self._waiting[rank_id]
            self._watch.remove(connection.fileno())
            logger.info(
                "rank %s registered: %s pages, %s bytes a block", rank_id, " and ".join(map(str, hello.num_pages)),
                " and ".join(str(claim.segment_bytes) for claim in hello.segments),
            )
            try:
                self._on_link(link)
            except BaseException:
                link.close()
                raise
            self._connected.add(rank_id)         # now that the data plane waits until the rank takes part
            self._give_gds(gds)
            return link
        return None

    def _give_gds(self, end: GdsEnd | None) -> None:
        if end is None or self._on_gds is None:
            return
        try:
            self._on_gds(end)
        except Exception as error:
            end.close()
            self._log.write(logging.ERROR, "GPUDirect Storage cannot be used", error)

    def _make_link(self, rank_id: RankId, terms: RankTerms | None) -> tuple[AgentLink, GdsEnd | None]:
        """A link to a rank that has got its WELCOME, and the controller's end of its socket of GPUDirect Storage."""
        connection, hello = self._waiting[rank_id]
        assert self._layout is not None  # narrowing; _admit has made sure
        assert self._pool is not None
        places = self._layout.placements(self._index[rank_id])
        rings = ControllerRings(self._ring_bytes, len(hello.num_pages))
        gds: tuple[socket.socket, ...] = ()
        link = None
        try:
            welcome = Welcome(
                self._pool.num_bytes, self._pool.slot_bytes, rings.ring_bytes, places, self._first_task,
                None if terms is None else terms.exchange,
            )
            if self._on_gds is not None and self._has_plain_slots(hello):
                gds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                close_in_children(gds[0])
            link = AgentLink(connection, hello, rings, any(place.write_stop > place.write_start for place in places))
            if terms is not None:
                link.exchange, link.spared_bytes = terms.number, terms.spared_bytes
            fds = [self._pool.fd, *rings.fds]
            socket.send_fds(connection, [welcome.pack()], fds + [end.fileno() for end in gds[1:]])
        except BaseException:
            rings.close()
            for end in gds:
                end.close()
            if link is not None:
                link.process.close()
            raise
        for end in gds[1:]:
            end.close()
        return link, GdsEnd(gds[0], PeerProcess(connection)) if gds else None

    def _has_plain_slots(self, hello: Hello) -> bool:
        """Whether a slot is one segment of the rank in one layer group, as GPUDirect Storage needs it."""
        if self._layout is not None and len(self._layout.segments) == len(hello.num_pages) == 1:
            return True
        logger.warning("GPUDirect Storage is off: it supports one segment and one layer group; blocks go through host "
                       "memory")
        return False

    def lost(self, hello: Hello) -> None:
        """Record that a rank's agent takes no ops any more, so that the rank can register again."""
        self._connected.discard((hello.pp_rank, hello.rank))

    @property
    def rank_ids(self) -> list[RankId]:
        """The ranks that have sent their HELLO."""
        return [*self._connected, *self._waiting]

    @property
    def complete(self) -> bool:
        """Whether every rank is connected."""
        return len(self._connected) == self._ranks

    def describe(self) -> str:
        """Number of connected ranks of the expected number, the socket, and the last refusal, in words."""
        refusal = f" (refused: {self._last_refusal})" if self._last_refusal else ""
        return (
            f"{len(self._connected)} of {self._ranks} ranks have registered their tensors at "
            f"{self._listening.path}{refusal}"
        )

    def close(self) -> None:
        """Stop listening, and close the connections that were not passed to ``on_link``. Can be called again."""
        if self.listener.fileno() >= 0:
            self._watch.remove(self.listener.fileno())
        self._listening.close()
        for connection, _ in [*self._silent.values(), *self._waiting.values()]:
            self._drop(connection)
