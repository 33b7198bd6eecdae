"""An engine's session with the daemon, at the daemon's end."""

import json
import logging
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv._core.record_rings import RecordRings
from flexkv.cache.plan import NO_MATCH, MatchResult
from flexkv.config.namespace_entry import NamespaceEntry
from flexkv.controller.engine_blocks import EngineBlocks
from flexkv.controller.keys import Keys
from flexkv.controller.response import KVResponseStatus
from flexkv.controller.shared_cache import SharedCache
from flexkv.errors import FlexKVError, RegistrationError
from flexkv.protocol import session as protocol
from flexkv.protocol.peer_process import PeerProcess
from flexkv.protocol.session import BlocksRequest, Flag, Hello, LaunchRequest, Note, Reply, Request, Welcome
from flexkv.protocol.sockets import ListeningSocket
from flexkv.server.request_numbers import RequestNumbers
from flexkv.transfer.watch import Watch

logger = logging.getLogger("flexkv.server")

_TURN = 64
"""Records of one session that are handled before other sessions have their turn."""

_MAX_UNSENT = 4096
"""Replies of one session that may wait for room in its ring. At more the session ends: its engine reads none."""

_SPIN_S = 300e-6
"""Time for which the daemon polls after its last work, in seconds: an engine's next request often comes within it."""

_PULSE_S = 0.5
"""Maximum time between two changes of a session's pulse, in seconds."""

_STATUSES = list(KVResponseStatus)


class Session:
    """One engine that uses a cache of the daemon. ``begin`` and all that follows run on the cache's background thread.

    A fault of the engine (a malformed record, a ring that it does not read, a hang-up) ends this session, and nothing
    else. The end cancels its tasks, drops its puts that were not accepted, and disconnects its ranks; blocks that are
    cached, and prefixes that a user has pinned, stay.

    Parameters
    ----------
    connection : socket
        The engine's; the session closes it.
    listening : ListeningSocket
        For the engine's ranks; the session closes it.
    hello : Hello
    cache : SharedCache
    secret : bytes
        Part of every key.
    accept_within_s : float
        As in ``TaskTable``.
    first_task : int
        The session's task ids are larger.
    on_end : callable
        ``on_end(session)``, called once on the background thread.
    may_leave_pool : bool
        The engine can have a pool of its own, if its ranks do not fit this one.

    Attributes
    ----------
    hello : Hello
    cache : SharedCache
    needs_own_pool : bool
        The engine's blocks have another layout than those of the pool.
    """

    def __init__(
        self,
        connection: socket.socket,
        listening: ListeningSocket,
        hello: Hello,
        cache: SharedCache,
        secret: bytes,
        accept_within_s: float,
        first_task: int,
        on_end: Callable[["Session"], None],
        may_leave_pool: bool,
    ) -> None:
        self.hello = hello
        self.cache = cache
        self._connection = connection
        self._listening: ListeningSocket | None = listening     # None: it is the cache's listener's
        self._first_task = first_task
        self._on_end = on_end
        self._rings = RecordRings(protocol.RING_BYTES)
        self._process = PeerProcess(connection)
        self._ids = RequestNumbers(first_task)
        self._news: deque[int] = deque()
        self._unsent: deque[tuple[Reply, bytes]] = deque()
        self._resets: list[tuple[int, list[int]]] = []      # number, tasks that must settle before the answer
        self._is_over, self.needs_own_pool, self._may_leave_pool = False, False, may_leave_pool
        self._pulse, self._pulsed = 0, -math.inf
        self._thread = 0
        self._watch: Watch | None = None
        self._blocks = EngineBlocks(
            cache, Keys(hello.domain.encode(), hello.tokens_per_block, secret), hello.tokens_per_block, hello.ranks,
            hello.dp_client_id, accept_within_s, first_task=first_task, task_ids=self._ids, on_news=self._note_news,
            after_turn=self._after_turn, on_other_layout=partial(cache.transfer.call_soon, self._leave_pool),
        )
        self._handlers: dict[Request, Callable[[bytes], None]] = {
            Request.LOOKUP: self._lookup, Request.MATCH_GET: self._match_get, Request.MATCH_PUT: self._match_put,
            Request.LAUNCH: self._launch, Request.GET: self._get, Request.PUT: self._put,
            Request.PREFETCH: self._prefetch, Request.ACCEPT: self._accept, Request.CANCEL: self._cancel,
            Request.RECORD: self._record, Request.CALL: self._call,
        }

    # ---- life -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Listen for the engine's ranks, and welcome the engine."""
        if self._is_over or self._listening is None:
            return
        self._thread = threading.get_ident()
        listener = self.cache.listener
        try:
            self._watch = listener.watch
            self._watch.spin_s = _SPIN_S
            listening, self._listening = self._listening, None
            listener.add(self._blocks.group, listening)
            end = partial(self.end, "the session's event could not be handled")
            self._watch.add(self._rings.receiving_event_fd, self._hear_records, lambda error: self.end(str(error)))
            self._watch.add(self._connection.fileno(), self._hear, lambda error: end())
            if self._process.fd >= 0:
                self._watch.add(self._process.fd, self._check, lambda error: end())
            welcome = Welcome(protocol.RING_BYTES, self._first_task + 1)
            socket.send_fds(self._connection, [welcome.pack()], self._rings.fds)
        except (FlexKVError, OSError) as error:
            self.end(f"it could not be welcomed: {error}")
            return
        logger.info("engine %s has connected (process %d)", self.hello.name, self._process.pid)

    def _leave_pool(self) -> None:
        """The engine's ranks do not fit the pool: it connects again, and gets a pool of its own."""
        if self._may_leave_pool and not self._is_over:
            self.needs_own_pool = True
            self.end("its blocks have another layout than those of the pool")

    def _hear(self) -> None:
        """The engine says nothing after its HELLO: this is its end."""
        with suppress(BlockingIOError):
            self._connection.recv(64, socket.MSG_DONTWAIT)
            self.end("it has disconnected")

    def _check(self) -> None:
        if self._process.is_gone:
            self.end("its process has ended")

    def end(self, reason: str) -> None:
        """End the session. Can be called again."""
        if self._is_over:
            return
        self._is_over = True
        logger.info("engine %s has left: %s", self.hello.name, reason)
        if self._watch is not None:
            for fd in (self._rings.receiving_event_fd, self._connection.fileno(), self._process.fd):
                self._watch.remove(fd)
        if self._listening is not None:
            self._listening.close()
        self._process.close()
        self.cache.listener.remove(self._blocks.group.client, "its engine has left")
        self._blocks.tasks.reset()
        self._rings.close()
        self._on_end(self)
        self._connection.close()                     # last: the engine connects again at once

    def _after_turn(self) -> float:
        """Send news to the engine; returns the time in seconds until the next call."""
        if self._is_over:
            if not self._blocks.tasks.unsettled():
                self.cache.leave(self._blocks.tasks)
            return _PULSE_S
        try:
            self._report()
        except FlexKVError as error:
            self.end(str(error))
        return _PULSE_S if not self._unsent else 0.001

    def _report(self) -> None:
        self._rings.note(Note.READY, int(self._blocks.is_ready()))
        now = time.monotonic()
        if now - self._pulsed >= _PULSE_S / 2:
            self._pulse, self._pulsed = self._pulse + 1, now
            self._rings.note(Note.PULSE, self._pulse)
        while self._unsent and self._rings.push(*self._unsent[0]):
            self._unsent.popleft()
        while self._news:
            self._send_result(self._news.popleft())
        for reset in list(self._resets):
            if all(map(self._blocks.tasks.is_settled, reset[1])):
                self._resets.remove(reset)
                self._answer(reset[0], None)

    def _note_news(self, task_id: int) -> None:
        self._news.append(task_id)
        if threading.get_ident() != self._thread:
            self.cache.transfer.wake()

    # ---- records ----------------------------------------------------------------------------------------------

    def _hear_records(self) -> None:
        try:
            self._serve()
        except FlexKVError as error:                 # an invalid record
            self.end(str(error))

    def _serve(self) -> None:
        """Handle the engine's records, up to ``_TURN`` of them."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._rings.receiving_event_fd)
        for _ in range(_TURN):
            record = self._rings.pop()
            if record is None:
                if not self._rings.set_waiting(True):
                    return
                continue
            kind, content = record
            try:
                handler = self._handlers[Request(kind)]
            except ValueError:
                raise RegistrationError(f"it has sent a record of kind {kind}; this version knows none") from None
            handler(content)
            if self._is_over:
                return
        os.eventfd_write(self._rings.receiving_event_fd, 1)

    def _send(self, kind: Reply, *parts: Any) -> None:
        if not self._unsent and self._rings.push(kind, *parts):
            return
        if len(self._unsent) >= _MAX_UNSENT:
            self.end(f"it has not read {_MAX_UNSENT} replies")
            return
        self._unsent.append((kind, b"".join(bytes(part) for part in parts)))

    def _answer(self, number: int, value: object) -> None:
        self._send(Reply.ANSWER, protocol.ANSWER.pack(number), json.dumps(value).encode())

    def _matched(
        self, number: int, match: MatchResult = NO_MATCH, positions: NDArray[np.int32] | None = None,
        has_task: bool = False,
    ) -> None:
        age = math.nan if math.isnan(match.evicted_at) else time.monotonic() - match.evicted_at
        count = 0 if positions is None else len(positions)
        head = protocol.MATCHED.pack(
            number, age, match.num_ready, match.num_to_fetch, count, match.reason, has_task, 0
        )
        self._send(Reply.MATCHED, head, b"" if positions is None else np.ascontiguousarray(positions))

    def _send_result(self, task_id: int) -> None:
        tasks = self._blocks.tasks
        is_settled = tasks.is_settled(task_id)
        if not is_settled and not tasks.has_result(task_id):
            return
        response = tasks.take(task_id)
        if response.status is not KVResponseStatus.NOTFOUND:
            mask = response.return_mask
            size = self.hello.tokens_per_block
            blocks = None if mask is None else mask[: len(mask) // size * size : size]
            status = _STATUSES.index(response.status)
            self._send(Reply.RESULT, *protocol.pack_result(task_id, status, is_settled, blocks, response.reason))

    @contextmanager
    def _refusing(self, number: int) -> Iterator[None]:
        """Answer a request that fails with its error."""
        try:
            yield
        except (FlexKVError, NotImplementedError) as error:
            content = {"kind": type(error).__name__, "text": protocol.cut(str(error))}
            self._send(Reply.ERROR, protocol.ANSWER.pack(number), json.dumps(content).encode())

    def _fail(self, task_ids: list[int], error: FlexKVError) -> None:
        """Report that tasks were not launched; they hold nothing any more."""
        with suppress(FlexKVError):
            self._blocks.cancel(task_ids)
        status = _STATUSES.index(KVResponseStatus.FAILED)
        for task_id in task_ids:
            self._send(Reply.RESULT, *protocol.pack_result(task_id, status, True, None, str(error)))

    # ---- requests ---------------------------------------------------------------------------------------------

    def _lookup(self, content: bytes) -> None:
        ask = BlocksRequest.unpack(content)
        with self._refusing(ask.number):
            count = bool(ask.flags & Flag.COUNT)
            self._matched(ask.number, self._blocks.lookup(ask.keys, ask.start, ask.tenant, count))

    def _match_get(self, content: bytes) -> None:
        ask = BlocksRequest.unpack(content)
        self._ids.take(ask.number)
        with self._refusing(ask.number):
            task_id, positions = self._blocks.match_get(
                ask.keys, ask.start, ask.value, ask.tenant, bool(ask.flags & Flag.HOST_ONLY)
            )
            self._matched(ask.number, self._blocks.task_match(task_id) or NO_MATCH, positions, True)

    def _match_put(self, content: bytes) -> None:
        ask = BlocksRequest.unpack(content)
        self._ids.take(ask.number)
        with self._refusing(ask.number):
            _, positions = self._blocks.match_put(ask.keys, ask.start, ask.value, ask.tenant)
            self._matched(ask.number, NO_MATCH, positions, True)

    def _launch(self, content: bytes) -> None:
        ask = LaunchRequest.unpack(content)
        try:
            self._blocks.launch(ask.task_ids, ask.pages, ask.fence, bool(ask.flags & Flag.LAYERWISE), ask.counter)
        except FlexKVError as error:
            self._fail(ask.task_ids, error)

    def _get(self, content: bytes) -> None:
        ask = BlocksRequest.unpack(content)
        self._ids.take(ask.number)
        try:
            self._blocks.get_blocks(
                ask.keys, ask.start, ask.pages, ask.value, bool(ask.flags & Flag.LAYERWISE), ask.tenant
            )
        except FlexKVError as error:
            self._fail([ask.number], error)

    def _put(self, content: bytes) -> None:
        ask = BlocksRequest.unpack(content)
        self._ids.take(ask.number)
        with self._refusing(ask.number):
            task_id = self._blocks.put_blocks(
                ask.keys, ask.start, ask.pages, ask.value, ask.tenant, provisional=bool(ask.flags & Flag.PROVISIONAL),
                after=ask.loads.tolist(),
            )
            positions = None if task_id is None else self._blocks.task_blocks(task_id)
            self._matched(ask.number, NO_MATCH, positions, task_id is not None)

    def _prefetch(self, content: bytes) -> None:
        ask = BlocksRequest.unpack(content)
        self._ids.take(ask.number)
        with self._refusing(ask.number):
            task_id = self._blocks.prefetch_blocks(
                ask.keys, ask.start, ask.tenant, num_tokens=ask.value, must_answer=bool(ask.flags & Flag.MUST_ANSWER)
            )
            self._matched(ask.number, has_task=task_id is not None)

    def _accept(self, content: bytes) -> None:
        task_id, stop = protocol.head_of(protocol.ACCEPT, content)
        with suppress(FlexKVError):
            self._blocks.accept_put(task_id, None if stop < 0 else stop)

    def _cancel(self, content: bytes) -> None:
        [tasks] = protocol.split(content, 0, (len(content) // 8, np.uint64))
        with suppress(FlexKVError):
            self._blocks.cancel(tasks.tolist())

    def _record(self, content: bytes) -> None:
        with suppress(FlexKVError):
            self._blocks.record_request(BlocksRequest.unpack(content).keys)

    def _call(self, content: bytes) -> None:
        number, command, keys = protocol.unpack_call(content)
        with self._refusing(number):
            match command:
                case {"command": "stats"}:
                    self._answer(number, self._blocks.stats())
                case {"command": "tenant", "namespace": list(namespace)}:
                    entries = [
                        NamespaceEntry(*map(str, entry)) for entry in namespace
                        if isinstance(entry, list) and len(entry) == 3
                    ]
                    self._answer(number, self._blocks.tenant(entries))
                case {"command": "pins"}:
                    self._answer(number, [[pin.name, pin.num_blocks] for pin in self._blocks.pins()])
                case {"command": "pin", "name": str(name), "tenant": int(tenant)}:
                    pinned = self._blocks.pin_keys(keys, name, tenant)
                    self._answer(number, [pinned.name, pinned.num_blocks])
                case {"command": "unpin", "name": str(name)}:
                    pinned = self._blocks.unpin(name)
                    self._answer(number, [pinned.name, pinned.num_blocks])
                case {"command": "check_integrity"}:
                    self._blocks.check_integrity()
                    self._answer(number, None)
                case {"command": "set_prefill_rate", "tokens_per_s": float(rate)}:
                    self._blocks.set_prefill_rate(rate)
                    self._answer(number, None)
                case {"command": "reset", "new_weights": bool(new_weights)}:
                    self._resets.append((number, self._blocks.begin_reset(new_weights)))
                case _:
                    raise RegistrationError("it has sent a command that this version does not know")
