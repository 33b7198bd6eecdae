"""Registration of ranks: from a connection to an agent that takes ops."""

import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from flexkv._core.ring import ControllerRings
from flexkv.errors import RegistrationError
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout
from flexkv.transfer.control import is_control
from flexkv.transfer.device import AgentLink
from flexkv.transfer.protocol import MAX_MESSAGE_BYTES, Hello, Welcome, listen, pack_refusal, peer_uid, socket_path

logger = logging.getLogger("flexkv.transfer")

RankId = tuple[int, int, int]
"""dp_client_id, pp_rank, rank."""


class Registry:
    """Listens for ranks; when all are there it fixes the slot layout, makes the host pool, and welcomes them.

    A rank whose process died can register again. Runs on the data plane's background thread alone.

    Parameters
    ----------
    port : str
        Path of the Unix socket.
    dp_client_ids : tuple of int
    ranks_per_client : int
    make_pool : callable
        ``make_pool(layout) -> HostPool``.
    handshake_timeout_s : float
        A connection that has not said HELLO by then is dropped.
    ring_bytes : int
        Data of each ring; a power of two.
    on_link : callable
        Called with each agent that is ready for ops.
    on_gds : callable, optional
        Called with the controller's end of each rank's socket of GPUDirect Storage; None: ranks get none.
    on_control : callable
        ``on_control(message, descriptors) -> reply`` to a user's request.

    Raises
    ------
    RegistrationError
        The socket cannot be had.
    """

    def __init__(
        self,
        port: str,
        dp_client_ids: tuple[int, ...],
        ranks_per_client: int,
        make_pool: Callable[[SlotLayout], HostPool],
        handshake_timeout_s: float,
        ring_bytes: int,
        on_link: Callable[[AgentLink], None],
        on_control: Callable[[bytes, Sequence[int]], bytes],
        on_gds: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self._path = socket_path(port)
        self._clients = dp_client_ids
        self._ranks = ranks_per_client
        self._make_pool = make_pool
        self._timeout_s = handshake_timeout_s
        self._ring_bytes = ring_bytes
        self._on_link = on_link
        self._on_control = on_control
        self._on_gds = on_gds
        self._silent: dict[int, tuple[socket.socket, float]] = {}       # by descriptor: until when
        self._waiting: dict[RankId, tuple[socket.socket, Hello]] = {}   # for the others
        self._connected: set[RankId] = set()
        self._index: dict[RankId, int] = {}                             # fixed with the layout
        self._layout: SlotLayout | None = None
        self._pool: HostPool | None = None
        self._last_refusal = ""
        self.listener = listen(port)

    def next_deadline(self) -> float | None:
        """When a connection will have been silent for too long (``time.monotonic``)."""
        return min((until for _, until in self._silent.values()), default=None)

    def accept(self, epoll: select.epoll) -> None:
        """Take new connections; their first message is awaited without blocking."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("a rank cannot connect: %s", error)
                return
            if peer_uid(connection) not in (os.getuid(), 0):
                logger.error("refused a connection from user %d", peer_uid(connection))
                connection.close()
                continue
            connection.setblocking(False)
            self._silent[connection.fileno()] = (connection, time.monotonic() + self._timeout_s)
            epoll.register(connection.fileno(), select.EPOLLIN)

    def owns(self, fd: int) -> bool:
        """Whether the descriptor is a connection that is not an agent yet."""
        return fd in self._silent or any(connection.fileno() == fd for connection, _ in self._waiting.values())

    def readable(self, fd: int, epoll: select.epoll) -> None:
        """A connection said its HELLO, or a user's request, or hung up."""
        if fd in self._silent:
            connection, _ = self._silent.pop(fd)
            if self._listen_to(connection):
                return
        else:
            rank_id, (connection, _) = next(
                (rank_id, item) for rank_id, item in self._waiting.items() if item[0].fileno() == fd
            )
            logger.warning("rank %s went away before all were there", rank_id)
            del self._waiting[rank_id]
        epoll.unregister(fd)
        connection.close()

    def _listen_to(self, connection: socket.socket) -> bool:
        """Take the first message; whether the connection is a rank's, and stays."""
        fds: list[int] = []
        try:
            message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            if is_control(message):
                connection.send(self._on_control(message, fds))
            elif message:
                self._admit(connection, Hello.unpack(message))
                return True
        except OSError as error:
            logger.warning("a rank's or user's connection broke: %s", error)
        except RegistrationError as error:
            self._refuse(connection, str(error))
        finally:
            for fd in fds:
                os.close(fd)
        return False

    def drop_silent(self, epoll: select.epoll) -> None:
        """Close connections that have said nothing in time."""
        now = time.monotonic()
        for fd, (connection, until) in list(self._silent.items()):
            if until <= now:
                logger.warning("a connection said nothing for %g s; dropped", self._timeout_s)
                del self._silent[fd]
                epoll.unregister(fd)
                connection.close()

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        logger.error("refused a rank: %s", reason)
        self._last_refusal = reason
        try:
            connection.send(pack_refusal(reason))
        except OSError as error:
            logger.debug("the refused rank is gone: %s", error)

    def _admit(self, connection: socket.socket, hello: Hello) -> None:
        rank_id = (hello.dp_client_id, hello.pp_rank, hello.rank)
        if hello.dp_client_id not in self._clients:
            raise RegistrationError(f"dp_client_id {hello.dp_client_id} is not served here; it is {self._clients}")
        if rank_id in self._connected or rank_id in self._waiting:
            raise RegistrationError(f"rank {rank_id} is registered already: give each its own intra_client_id")
        if self._layout is not None:
            index = self._index.get(rank_id)
            if index is None or self._layout.segment_bytes[index] != hello.segment_bytes:
                raise RegistrationError(
                    f"rank {rank_id} with {hello.segment_bytes} bytes a block does not fit the pool"
                )
            if self._layout.contents[index] != hello.content:
                raise RegistrationError(
                    f"rank {rank_id} registers tensors of other shapes than before, for which what is cached is wrong: "
                    "start a new KVManager"
                )
        self._waiting[rank_id] = (connection, hello)
        mine = [rank for rank in self._waiting if rank[0] == hello.dp_client_id]
        if self._layout is None and len(mine) == self._ranks:
            self._fix_layout()
        if self._layout is not None:
            for rank_id in list(self._welcomable()):
                self._welcome(rank_id)

    def _welcomable(self) -> Iterator[RankId]:
        return (rank_id for rank_id in self._waiting if rank_id in self._index)

    def _fix_layout(self) -> None:
        waiting = sorted(self._waiting)
        parts: dict[int, list[Hello]] = {}
        for rank_id in waiting:
            parts.setdefault(rank_id[0], []).append(self._waiting[rank_id][1])
        complete = [client for client, hellos in parts.items() if len(hellos) == self._ranks]
        first = parts[complete[0]]
        layout = SlotLayout.of([hello.segment_bytes for hello in first], [hello.content for hello in first])
        self._pool = self._make_pool(layout)
        self._layout = layout
        for client in complete:
            for index, rank_id in enumerate(rank for rank in waiting if rank[0] == client):
                self._index[rank_id] = index

    def _welcome(self, rank_id: RankId) -> None:
        connection, hello = self._waiting.pop(rank_id)
        assert self._layout is not None and self._pool is not None  # narrowing; _admit has made sure
        rings = ControllerRings(self._ring_bytes)
        index = self._index[rank_id]
        welcome = Welcome(
            self._pool.num_bytes, self._pool.slot_bytes, self._layout.segment_offsets[index],
            self._layout.segment_bytes[index], rings.ring_bytes,
        )
        fds = [self._pool.fd, rings.fd, rings.submission_event_fd, rings.completion_event_fd]
        gds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) if self._on_gds is not None else ()
        try:
            socket.send_fds(connection, [welcome.pack()], fds + [end.fileno() for end in gds[1:]])
        except OSError as error:
            logger.warning("rank %s went away before it was welcomed: %s", rank_id, error)
            rings.close()
            for each in (connection, *gds):
                each.close()
            return
        self._connected.add(rank_id)
        logger.info("rank %s registered: %d pages, %d bytes a block", rank_id, hello.num_pages, hello.segment_bytes)
        self._on_link(AgentLink(connection, hello, rings))
        if gds and self._on_gds is not None:
            gds[1].close()
            self._on_gds(gds[0])

    def lost(self, hello: Hello) -> None:
        """The rank's process is gone; it may register again."""
        self._connected.discard((hello.dp_client_id, hello.pp_rank, hello.rank))

    @property
    def complete(self) -> bool:
        """Every rank of every client is connected."""
        return len(self._connected) == self._ranks * len(self._clients)

    def describe(self) -> str:
        """How many ranks are connected and how many are missing, in words."""
        refusal = f" (refused: {self._last_refusal})" if self._last_refusal else ""
        return (
            f"{len(self._connected)} of {self._ranks * len(self._clients)} ranks have registered their tensors at "
            f"{self._path}{refusal}"
        )

    def close(self) -> None:
        """Stop listening, and hang up on those who wait."""
        self.listener.close()
        self._path.unlink(missing_ok=True)
        for connection, _ in [*self._silent.values(), *self._waiting.values()]:
            connection.close()
        self._silent.clear()
        self._waiting.clear()


