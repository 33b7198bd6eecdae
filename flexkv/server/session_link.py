"""An engine's connection to the daemon, which comes and goes: requests and replies over shared memory."""

import json
import logging
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import flexkv.errors
from flexkv._core.record_rings import RecordRings
from flexkv.at_fork import close_in_children
from flexkv.errors import FlexKVError, RegistrationError, RingCorruptedError
from flexkv.protocol import session as protocol
from flexkv.protocol.session import MAX_MESSAGE_BYTES, NUM_FDS, Hello, Note, Reply, Request, Welcome
from flexkv.protocol.sockets import connect

logger = logging.getLogger("flexkv.server")

CALL_S = 0.1
"""Maximum time of a request, in seconds. The engine's scheduler waits meanwhile."""

_SPIN_NS = 20_000
_SPIN_S = 220e-6
"""Time for which a thread that waits polls the ring before it sleeps: the daemon answers most requests within it."""

_MAX_LATE = 3
"""Requests in a row without a reply in time, after which nothing is asked until the daemon's pulse has changed."""

_WELCOME_S = 30.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 2.0
"""Pause between two attempts to connect, in seconds; it doubles, and is varied at random, so that the engines of a node
do not all connect in the same moment."""

_FULL_PAUSE_S = 0.0005

Answer = tuple[Reply, bytes]
_T = TypeVar("_T")


class _Connection:
    """One session: socket and rings."""

    def __init__(self, connection: socket.socket, rings: RecordRings, first_number: int) -> None:
        self.socket = connection
        self.rings = rings
        self.first_number = first_number
        self.expected: dict[int, Answer | None] = {}
        self.num_late = 0
        self.stalled_at = -1                         # pulse at which the daemon was seen to stand still; -1: it works
        self.is_over = False

    def close(self) -> None:
        self.is_over = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)   # wakes the thread that waits for it
        self.socket.close()
        self.rings.close()


class SessionLink:
    """Keeps an engine connected to the daemon. Thread safe.

    A thread connects, and connects again when the daemon has gone; it also takes replies that no caller waits for.

    Parameters
    ----------
    path : Path
        The daemon's socket.
    hello : callable
        ``hello(number)``: the HELLO of a session whose numbers must be larger than ``number``.
    on_result : callable
        Called with the content of each RESULT, under the lock.
    on_late : callable
        ``on_late(number, reply)``, called under the lock with each reply that no caller waits for any more; with None
        if the request was not sent.
    on_connect : callable
        Called without the lock when a session has begun, before ``is_ready`` can be true; False ends the session.
    on_lost : callable
        Called under the lock when a session has ended: its tasks have no result any more.
    """

    def __init__(
        self,
        path: Path,
        hello: Callable[[int], Hello],
        on_result: Callable[[bytes], None],
        on_late: Callable[[int, Answer | None], None],
        on_connect: Callable[[], bool],
        on_lost: Callable[[], None],
    ) -> None:
        self._path = path
        self._hello = hello
        self._on_result = on_result
        self._on_late = on_late
        self._on_connect = on_connect
        self._on_lost = on_lost
        self.lock = threading.RLock()
        self._news = threading.Condition(self.lock)
        self._number = 0
        self._current: _Connection | None = None
        self._opening: socket.socket | None = None   # has no WELCOME yet
        self._is_usable = False                      # ``on_connect`` has returned
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect in the background; returns at once."""
        self._thread = threading.Thread(target=self._run, name="flexkv-session", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the session. May be called again."""
        self._closing.set()
        with self.lock, suppress(OSError):
            if self._opening is not None:
                self._opening.shutdown(socket.SHUT_RDWR)     # wakes the thread, also if the daemon is stopped
        self.drop("the engine has closed it")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_WELCOME_S)

    def drop(self, reason: str) -> None:
        """End the current session; another one begins, unless this was closed."""
        with self.lock:
            link, self._current, self._is_usable = self._current, None, False
            if link is None:
                return
            link.close()
            self._on_lost()
            self._news.notify_all()
        if not self._closing.is_set():
            logger.warning("no connection to the daemon at %s: %s. KV is not loaded or saved until it is back",
                           self._path, reason)

    @property
    def is_connected(self) -> bool:
        """Whether there is a session."""
        return self._current is not None

    @property
    def is_ready(self) -> bool:
        """Whether the daemon answers, and can load and save the engine's KV."""
        link = self._current
        return link is not None and self._is_usable and link.rings.read_note(Note.READY) == 1 and self._works(link)

    def _works(self, link: _Connection) -> bool:
        if link.stalled_at >= 0 and link.rings.read_note(Note.PULSE) != link.stalled_at:
            link.stalled_at, link.num_late = -1, 0
        return link.stalled_at < 0

    def _run(self) -> None:
        pause, has_logged = _FIRST_PAUSE_S, False
        while not self._closing.is_set():
            try:
                self._connect()
            except (FlexKVError, OSError, MemoryError) as error:
                if not has_logged:
                    logger.warning("the daemon at %s cannot be used yet, so no KV is loaded or saved: %s", self._path,
                                   error)
                    has_logged = True
                self._closing.wait(pause * random.uniform(0.5, 1.0))
                pause = min(_MAX_PAUSE_S, 2 * pause)
                continue
            pause, has_logged = _FIRST_PAUSE_S, False
            self._serve()

    def _connect(self) -> None:
        deadline = time.monotonic() + _WELCOME_S
        connection = connect(self._path, deadline, self._closing)
        try:
            close_in_children(connection)
            connection.settimeout(_WELCOME_S)
            with self.lock:
                number, self._opening = self._number, connection
                if self._closing.is_set():
                    raise RegistrationError("closed while connecting")
            connection.send(self._hello(number).pack())
            message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, NUM_FDS, socket.MSG_CMSG_CLOEXEC)
            try:
                if not message:
                    raise RegistrationError("it closed the connection: see its log")
                welcome = Welcome.unpack(message)
                if len(fds) != NUM_FDS:
                    raise RegistrationError(f"{len(fds)} of {NUM_FDS} descriptors arrived: raise ulimit -n")
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
            rings = RecordRings(welcome.ring_bytes, fds)
        except BaseException:
            with self.lock:
                self._opening = None
                connection.close()
            raise
        with self.lock:
            self._opening = None
            if self._closing.is_set():
                connection.close()
                rings.close()
                return
            self._number = welcome.first_task - 1
            self._current = _Connection(connection, rings, welcome.first_task)
        logger.info("connected to the daemon at %s", self._path)
        usable = self._on_connect()
        with self.lock:
            self._is_usable = usable and self._current is not None
        if not usable:
            self.drop("the cache could not be reset")

    def _serve(self) -> None:
        """Take replies until the session ends."""
        link = self._current
        if link is None:
            return
        poll = select.poll()
        poll.register(link.socket.fileno(), select.POLLIN | select.POLLHUP)
        poll.register(link.rings.receiving_event_fd, select.POLLIN)
        sock, event = link.socket.fileno(), link.rings.receiving_event_fd
        while not link.is_over:
            ready = [fd for fd, _ in poll.poll(1000)]
            if link.is_over:
                return
            if event in ready:
                with suppress(BlockingIOError, OSError):
                    os.eventfd_read(event)
            with self.lock:
                if link.is_over:
                    return
                self._take(link)
                link.rings.set_waiting(True)
                self._take(link)
                self._news.notify_all()
            if sock in ready:
                self.drop("it has ended")

    # ---- requests ---------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """The number of the next request, and id of its task."""
        with self.lock:
            self._number += 1
            return self._number

    def send(self, kind: Request, *parts: Any, must: bool = False) -> bool:
        """Send a request without waiting for a reply; False: it cannot be sent now. ``must``: the session ends if the
        request cannot be sent."""
        with self.lock:
            link = self._current
            if link is None or not self._fits(link, parts):
                return False
            until = time.monotonic() + (CALL_S if self._works(link) else 0.0)
            while not link.is_over:
                try:
                    if link.rings.push(kind, *parts):
                        return True
                except RingCorruptedError as error:
                    self.drop(str(error))
                    return False
                if time.monotonic() >= until:
                    break
                self._news.wait(_FULL_PAUSE_S)
            if must:
                self.drop("it does not read requests")
            return False

    def _fits(self, link: _Connection, parts: tuple[Any, ...]) -> bool:
        size = sum(memoryview(part).nbytes for part in parts)
        if size > link.rings.max_record:
            logger.warning("a request of %d bytes is not sent: the limit is %d", size, link.rings.max_record)
        return size <= link.rings.max_record

    def ask(
        self, kind: Request, number: int, *parts: Any, timeout_s: float = CALL_S, must: bool = False
    ) -> Answer | None:
        """Send a request and wait for its reply; None: none came in time, or the request cannot be sent.

        Raises
        ------
        FlexKVError
            The daemon has refused the request.
        """
        with self.lock:
            link = self._current
            works = link is not None and self._works(link)
            if link is None or not (must or works) or number < link.first_number:
                return self._on_late(number, None)
            link.expected[number] = None
            if self.send(kind, *parts, must=must):
                self._await(
                    link, lambda: link.is_over or link.expected[number] is not None, timeout_s if works else 0.0
                )
            else:
                self._on_late(number, None)
            answer = link.expected.pop(number)
            if answer is not None:
                link.num_late = 0
            elif not link.is_over:
                self._was_late(link)
        if answer is not None and answer[0] is Reply.ERROR:
            raise _error_of(answer[1])
        return answer

    def _was_late(self, link: _Connection) -> None:
        link.num_late += 1
        if link.num_late >= _MAX_LATE and link.stalled_at < 0:
            link.stalled_at = link.rings.read_note(Note.PULSE)
            logger.warning("the daemon at %s does not answer: it is not asked until it does again", self._path)

    def call(
        self, command: dict[str, Any], read: Callable[[Any], _T], keys: Any = None, timeout_s: float = CALL_S
    ) -> _T:
        """Send a command; returns its answer, as ``read`` makes it of the JSON value. RegistrationError if none came in
        time, or one that ``read`` cannot read. Raises as ``ask``."""
        number = self.next_number()
        answer = self.ask(Request.CALL, number, *protocol.pack_call(number, command, keys), timeout_s=timeout_s)
        if answer is None:
            raise RegistrationError(f"the daemon at {self._path} does not answer: is it running?")
        try:
            return read(protocol.unpack_answer(answer[1])[1])
        except (TypeError, ValueError) as error:
            if isinstance(error, FlexKVError):
                raise
            raise RegistrationError("the daemon answers as another version does: use its version") from None

    def wait(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``predicate()``, which replies make true, at most ``timeout_s`` seconds."""
        with self.lock:
            return self._await(self._current, predicate, timeout_s)

    def poll(self) -> None:
        """Take the replies that have come."""
        with self.lock:
            if self._current is not None:
                self._take(self._current)

    def _await(self, link: _Connection | None, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Under the lock, which it releases while it sleeps."""
        now = time.monotonic()
        until, spin_until = now + timeout_s, now + min(timeout_s, _SPIN_S)
        if link is not None and not link.is_over:
            link.rings.set_waiting(False)
        try:
            while not predicate():
                now = time.monotonic()
                if link is not None and not link.is_over:
                    if now < spin_until:
                        if link.rings.spin(_SPIN_NS):
                            self._take(link)
                        continue
                    if link.rings.set_waiting(True):
                        self._take(link)
                        continue
                elif link is not None and timeout_s <= CALL_S:
                    return predicate()
                if now >= until:
                    return False
                self._news.wait(until - now)
            return True
        finally:
            if link is not None and not link.is_over and link.rings.set_waiting(True):
                self._take(link)

    def _take(self, link: _Connection) -> None:
        """Take the replies that are in the ring. Under the lock."""
        try:
            while not link.is_over and (record := link.rings.pop()) is not None:
                kind, content = record
                if kind == Reply.RESULT:
                    self._on_result(content)
                elif kind in (Reply.MATCHED, Reply.ANSWER, Reply.ERROR):
                    [number] = protocol.head_of(protocol.ANSWER, content)
                    if number in link.expected:
                        link.expected[number] = Reply(kind), content
                    else:
                        self._on_late(number, (Reply(kind), content))
                else:
                    raise RegistrationError(f"it has sent a record of kind {kind}")
        except FlexKVError as error:
            self.drop(str(error))


def _error_of(content: bytes) -> FlexKVError:
    """The error that the daemon has answered."""
    _, value = protocol.unpack_answer(content)
    content_of = value if isinstance(value, dict) else {"kind": "", "text": json.dumps(value)}
    kind, text = str(content_of.get("kind")), str(content_of.get("text"))
    found = getattr(flexkv.errors, kind, None)
    known = isinstance(found, type) and issubclass(found, FlexKVError)
    try:
        return found(text) if known and found is not None else RegistrationError(text)
    except TypeError:                                # an error with more arguments than its text
        return RegistrationError(text)
