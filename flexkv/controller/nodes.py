"""Connections of storage hosts on other nodes: from a TCP connection to a link that takes ops."""

import errno
import logging
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from flexkv.at_fork import close_in_children
from flexkv.config import TransferConfig
from flexkv.errors import NodeLinkError, RegistrationError
from flexkv.protocol.node_frames import REPLY_BYTES, Frames, Greeting
from flexkv.protocol.nodes import CONTROLLER_SILENCE_S, PING_S, FrameKind, Join, Terms, pack_json, parse_join
from flexkv.protocol.registration import Hello
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.executors.node_link import NodeLink, Ranks
from flexkv.transfer.repeated_log import RepeatedLog
from flexkv.transfer.watch import Watch

logger = logging.getLogger("flexkv.controller")

_PAUSE_S = 0.5
_AGAIN_S = 0.01
"""Time after which a JOIN is looked at again that has come before the end of the node's last connection, in seconds."""

_MAX_CONNECTIONS = 64
"""Connections at a time that have not joined yet: their other ends may not know the secret."""


class _Guest:
    """A connection of a storage host that has not joined yet."""

    def __init__(self, connection: socket.socket, address: str, secret: str, until: float) -> None:
        self.connection, self.address, self.until = connection, address, until
        self.greeting = Greeting(secret)
        self.reply = b""
        self.frames: Frames | None = None            # once it has shown that it knows the secret


class NodeListener:
    """Accepts the storage hosts of an engine's other nodes. All methods must be called on the data plane's background
    thread, except ``describe``.

    A storage host joins when its ranks have registered with it. If it comes again after its connection was lost, its
    ranks are at rest, so that slots of the lost connection are free. If its host pool is a new one, the content of all
    slots is lost.

    Parameters
    ----------
    watch : Watch
    config : TransferConfig
    client : int
        Number of the engine in the data plane.
    terms : Terms
        For the storage hosts.
    num_nodes : int
        Nodes besides this one.
    on_link : callable
        ``on_link(link)``, called with the NodeLink of each storage host that has joined; takes ownership.
    on_new_content : callable
        Called when a storage host has lost the content of its slots.
    near_ranks : callable
        Returns ``(pp_rank, rank)`` of the ranks on this node that have registered.
    num_usable : callable
        Returns the number of slots that have become usable.

    Raises
    ------
    RegistrationError
        The port cannot be used.
    """

    def __init__(
        self, watch: Watch, config: TransferConfig, client: int, terms: Terms, num_nodes: int,
        on_link: Callable[[AgentLink], None], on_new_content: Callable[[], None],
        near_ranks: Callable[[], Iterable[tuple[int, int]]] = lambda: (), num_usable: Callable[[], int] = lambda: 0,
    ) -> None:
        self._watch, self._client, self._terms, self._num_nodes = watch, client, terms, num_nodes
        self._secret, self._timeout_s = config.node_secret, config.handshake_timeout_s
        self._on_link, self._on_new_content = on_link, on_new_content
        self._near_ranks, self._num_usable = near_ranks, num_usable
        self._guests: dict[int, _Guest] = {}         # by descriptor
        self._links: dict[Ranks, NodeLink] = {}      # the last of each node
        self._log = RepeatedLog(logger)
        self._listener = _listen(config.master_host, config.master_port)
        self.address = f"{config.master_host}:{config.master_port}"
        watch.add(self._listener.fileno(), self._accept, lambda error: watch.pause(self._listener.fileno(), _PAUSE_S))
        watch.after(PING_S, self._tick)

    # ---- connections ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._log.write(logging.WARNING, f"a storage host cannot connect: {error.strerror or error}")
            self._watch.pause(self._listener.fileno(), _PAUSE_S)
            return
        close_in_children(connection)
        if len(self._guests) >= _MAX_CONNECTIONS:
            strangers = (guest for guest in self._guests.values() if guest.frames is None)
            self._drop(next(strangers, next(iter(self._guests.values()))), "others have connected since")
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        guest = _Guest(connection, str(address[0]), self._secret, time.monotonic() + self._timeout_s)
        fd = connection.fileno()
        self._guests[fd] = guest
        self._watch.add(fd, partial(self._hear, guest), lambda error: self._drop(guest, str(error)))
        with suppress(OSError):                      # a connection that has ended is noticed as such
            connection.send(guest.greeting.challenge())

    def _hear(self, guest: _Guest) -> None:
        """Handle the messages of a storage host that has not joined yet."""
        try:
            if guest.frames is None:
                self._greet(guest)
                return
            while (frame := guest.frames.receive()) is not None:
                kind, payload = frame
                if kind is FrameKind.JOIN:
                    self._admit(guest, guest.frames, parse_join(payload))
                    return
                if kind is not FrameKind.PONG:
                    raise NodeLinkError(f"a frame of kind {kind.name} before it has joined")
            if guest.frames.has_ended():
                self._drop(guest, "it has closed the connection")
        except NodeLinkError as error:
            self._drop(guest, str(error))

    def _greet(self, guest: _Guest) -> None:
        try:
            data = guest.connection.recv(REPLY_BYTES - len(guest.reply))
        except BlockingIOError:
            return
        except OSError as error:
            raise NodeLinkError(f"its connection broke: {error.strerror or error}") from error
        if not data:
            raise NodeLinkError("it has closed the connection before it showed that it knows the secret")
        guest.reply += data
        if len(guest.reply) < REPLY_BYTES:
            return
        answer = guest.greeting.answer_to(guest.reply)
        with suppress(OSError):
            guest.connection.send(answer)            # fits a socket that nothing was sent on
        sending_key, receiving_key = guest.greeting.keys()
        guest.frames = Frames(guest.connection, sending_key, receiving_key)
        guest.frames.push(FrameKind.TERMS, pack_json(self._terms))

    def _drop(self, guest: _Guest, reason: str) -> None:
        fd = guest.connection.fileno()
        if fd >= 0:
            self._log.write(logging.WARNING, f"the storage host at {guest.address} is not connected: {reason}")
            self._watch.remove(fd)
            self._guests.pop(fd, None)
            guest.connection.close()

    # ---- nodes ------------------------------------------------------------------------------------------------

    def _admit(self, guest: _Guest, frames: Frames, join: Join) -> None:
        before = self._links.get(join.ranks)
        if before is not None and before.is_connected:
            raise NodeLinkError(f"ranks {_list(join.ranks)} are connected already: start one storage host a node")
        self._check(join, before)
        if before is not None and not before.is_detached:          # its end is noticed in this turn or the next
            self._watch.after(_AGAIN_S, partial(self._admit_again, guest, frames, join))
            return
        self._watch.remove(guest.connection.fileno())
        self._guests.pop(guest.connection.fileno())
        if before is not None:
            before.rest.report()
            if before.incarnation != join.incarnation:
                logger.warning("%s has lost its host memory: all cached blocks are dropped", before.name)
                self._on_new_content()
        pp_rank, rank = join.ranks[0]
        hello = Hello(self._client, pp_rank, rank, 0, join.num_pages, ())
        link = NodeLink(frames, hello, join, guest.address)
        logger.info("%s has joined", link.name)
        try:
            self._on_link(link)
        except BaseException:
            link.close()
            raise
        self._links[join.ranks] = link

    def _admit_again(self, guest: _Guest, frames: Frames, join: Join) -> None:
        if guest.connection.fileno() >= 0:
            try:
                self._admit(guest, frames, join)
            except NodeLinkError as error:
                self._drop(guest, str(error))

    def _check(self, join: Join, before: NodeLink | None) -> None:
        """NodeLinkError if the ranks cannot be those of a node."""
        others = [rank for ranks in self._links if ranks != join.ranks for rank in ranks] + list(self._near_ranks())
        if len(join.ranks) != self._terms.num_ranks or len(set(join.ranks)) != len(join.ranks):
            raise NodeLinkError(f"{len(join.ranks)} ranks, where each node has {self._terms.num_ranks}")
        if set(join.ranks) & set(others) or (before is None and len(self._links) >= self._num_nodes):
            raise NodeLinkError(f"ranks {_list(join.ranks)} do not fit those of the other nodes, {_list(others)}: give "
                                "each rank a number of its own (intra_client_id)")
        if join.num_slots < (usable := self._num_usable()):
            raise NodeLinkError(f"it has {join.num_slots} slots, and {usable} are in use: give all nodes the same "
                                "memory, and start the engine again")

    def _tick(self) -> None:
        """Send PINGs, and close connections that are silent."""
        if self._listener.fileno() < 0:
            return
        self._watch.after(PING_S, self._tick)
        now = time.monotonic()
        for guest in list(self._guests.values()):
            if guest.frames is None and now > guest.until:
                self._drop(guest, f"it has said nothing for {self._timeout_s:g} s")
            elif guest.frames is not None:
                if now - guest.frames.heard > CONTROLLER_SILENCE_S:
                    self._drop(guest, f"it has sent nothing for {CONTROLLER_SILENCE_S:g} s")
                else:
                    guest.frames.push(FrameKind.PING)
        for link in self._links.values():
            if link.is_connected:
                link.check_silence()

    def describe(self) -> str:
        """Number of connected nodes of the expected number, and the address, in words."""
        connected = sum(link.is_connected for link in list(self._links.values()))
        return f"{connected} of {self._num_nodes} other nodes have joined at {self.address}"

    def close(self) -> None:
        """Stop listening, and close the connections that have not joined. Can be called again."""
        if self._listener.fileno() >= 0:
            self._watch.remove(self._listener.fileno())
        self._listener.close()
        for guest in list(self._guests.values()):
            self._drop(guest, "the controller is closed")


def _list(ranks: "Ranks | list[tuple[int, int]]") -> str:
    return ", ".join(f"{pp_rank}-{rank}" for pp_rank, rank in ranks) or "none"


def _listen(host: str, port: int) -> socket.socket:
    """Listen at an address of this node. If the name is of another machine, such as that of a service in front of this
    one, at all addresses."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except (OSError, UnicodeError) as error:
        raise RegistrationError(f"master_host {host!r} cannot be used: {error}") from error
    close_in_children(listener)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            listener.bind(("::" if family is socket.AF_INET6 else "", port))
        listener.listen(_MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise RegistrationError(
            f"port {port} of {host} cannot be used for the other nodes: {error.strerror or error}; set master_ports"
        ) from error
    return listener
