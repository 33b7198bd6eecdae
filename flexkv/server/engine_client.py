"""An engine's blocks in the daemon, from the engine's process."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher
from flexkv.at_exit import close_at_exit
from flexkv.cache.plan import NO_MATCH, MatchResult
from flexkv.cache.reasons import MISS_REASONS
from flexkv.controller.blocks import Blocks
from flexkv.controller.keys import Keys
from flexkv.controller.response import KVResponse
from flexkv.controller.tasks import reasons
from flexkv.controller.tasks.arguments import (
    block_of,
    keys_of,
    launch_of,
    namespace_of,
    number_of,
    seconds_of,
    span_of,
    task_id_of,
    task_ids_of,
    unique_task_ids_of,
)
from flexkv.errors import FlexKVError, NotReadyError, RegistrationError
from flexkv.protocol import session as protocol
from flexkv.protocol.numbers import fence_of, integer_of
from flexkv.protocol.requests import Pin
from flexkv.protocol.session import BlocksRequest, Flag, Hello, LaunchRequest, Reply, Request
from flexkv.server.client_tasks import NO_BLOCKS, ClientTask, ClientTasks, pin_of
from flexkv.server.session_link import Answer, SessionLink

_READY_POLL_S = 0.02

_MAX_TENANTS = 4096
"""Numbers of tenants that are remembered; with more, all are asked for again."""


class EngineClient(Blocks):
    """The blocks of one engine, kept by the daemon.

    Keys are made in this process. Without a daemon, or while that does not answer, matches are empty and puts save
    nothing. If the daemon ends, tasks that run have failed, and a thread connects again. No call waits for the daemon
    longer than 0.1 s, but for ``wait`` and ``reset``.

    Parameters
    ----------
    path : Path
        The daemon's socket.
    hello : Hello
        Description of the engine.
    keys : Keys
    """

    def __init__(self, path: Path, hello: Hello, keys: Keys) -> None:
        self._hello, self._path, self._keys = hello, path, keys
        self._tasks = ClientTasks(hello.tokens_per_block)
        self._tenants: dict[tuple[str, ...], int] = {}
        self._must_reset = False
        self._prefill_rate = 0.0
        self._link = SessionLink(
            path, lambda number: replace(hello, first_task=number), self._tasks.result, self._late,
            self._connected, self._lost,
        )

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See ``Blocks``. Connects to the daemon in the background."""
        close_at_exit(self, type(self).shutdown)
        self._link.start()

    def is_ready(self) -> bool:
        """See ``Blocks``."""
        return self._link.is_ready

    def wait_ready(self, timeout: float = 60.0) -> None:
        """See ``Blocks``."""
        timeout = seconds_of(timeout, "timeout")
        until = time.monotonic() + timeout
        while not self.is_ready():
            if time.monotonic() >= until:
                state = "not every rank has registered with" if self._link.is_connected else "no answer of"
                raise NotReadyError(f"{state} the daemon at {self._path} after {timeout:g} s")
            time.sleep(_READY_POLL_S)

    def shutdown(self) -> None:
        """See ``Blocks``. Ends the session; the daemon keeps the cached blocks."""
        self._link.close()

    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """See ``Blocks``. If the daemon does not answer, the cache is reset before it is used again."""
        timeout = seconds_of(timeout, "timeout")
        if new_weights:
            self._keys.change_domain()
        else:
            self._must_reset = True
        self._reset(timeout, new_weights)

    def _reset(self, timeout_s: float, new_weights: bool) -> bool:
        with self._link.lock:
            self._tasks.forget_matched()
        try:
            self._link.call({"command": "reset", "new_weights": new_weights}, bool, timeout_s=timeout_s)
        except FlexKVError as error:
            self._link.drop(f"the cache could not be reset: {error}")
            return False
        if not new_weights:
            self._must_reset = False
        return True

    def _connected(self) -> bool:
        """Prepare a new session."""
        self._tenants.clear()
        if self._must_reset and not self._reset(5.0, False):
            return False
        if self._prefill_rate:
            self._set_prefill_rate()
        return True

    def _late(self, number: int, answer: Answer | None) -> None:
        """End a put or prefetch for which the daemon does nothing, so that it has no RESULT."""
        if answer is None or answer[0] is Reply.ERROR or (answer[0] is Reply.MATCHED and not self._matched(answer)[2]):
            self._tasks.fail([number], reasons.NOTHING_TO_DO if answer else reasons.NO_DAEMON)

    def _lost(self) -> None:
        self._tasks.fail(None, reasons.NO_DAEMON)

    # ---- keys -------------------------------------------------------------------------------------------------

    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """See ``Blocks``."""
        return self._keys.hasher(namespace)

    def keys(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None = None,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> NDArray[np.uint64]:
        """See ``Blocks``."""
        return self._keys.keys(token_ids, namespace, block_extras)

    def tenant(self, namespace: Sequence[str] | None) -> int:
        """See ``Blocks``. 0 while the daemon does not answer."""
        entries = namespace_of(namespace)
        if not entries:
            return 0
        found = self._tenants.get(entries)
        if found is None:
            parts = [[entry.kind, entry.name, entry.version] for entry in entries]
            try:
                found = self._link.call({"command": "tenant", "namespace": parts}, int)
            except FlexKVError:
                return 0
            if len(self._tenants) >= _MAX_TENANTS:
                self._tenants.clear()
            self._tenants[entries] = found
        return found

    # ---- matching ---------------------------------------------------------------------------------------------

    def _matched(self, answer: Answer | None) -> tuple[MatchResult, NDArray[np.int32], bool]:
        """Match, positions, and whether there is a task."""
        if answer is None:
            return NO_MATCH, NO_BLOCKS, False
        try:
            _, age, num_ready, num_to_fetch, count, reason, has_task, _ = protocol.head_of(protocol.MATCHED, answer[1])
            [positions] = protocol.split(answer[1], protocol.MATCHED.size, (count, np.int32))
            known = MISS_REASONS[reason]
        except (RegistrationError, IndexError):
            self._link.drop("it does not answer as this version does")
            return NO_MATCH, NO_BLOCKS, False
        evicted_at = math.nan if math.isnan(age) else time.monotonic() - age
        return MatchResult(num_ready, known, num_to_fetch, evicted_at), positions, bool(has_task)

    def record_request(self, keys: NDArray[np.uint64]) -> None:
        """See ``Blocks``."""
        self._link.send(Request.RECORD, *BlocksRequest(0, keys_of(keys)).parts())

    def lookup(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, count: bool = False
    ) -> MatchResult:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), _tenant_of(tenant)
        if not self.is_ready():
            return NO_MATCH
        number = self._link.next_number()
        ask = BlocksRequest(number, keys, start, tenant, Flag.COUNT if count else 0)
        return self._matched(self._link.ask(Request.LOOKUP, number, *ask.parts()))[0]

    def match_get(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0, host_only: bool = False
    ) -> tuple[int, NDArray[np.int32]]:
        """See ``Blocks``."""
        return self._match(Request.MATCH_GET, keys, start_block, num_tokens, tenant, Flag.HOST_ONLY if host_only else 0)

    def match_put(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0
    ) -> tuple[int, NDArray[np.int32]]:
        """See ``Blocks``."""
        return self._match(Request.MATCH_PUT, keys, start_block, num_tokens, tenant, 0)

    def _match(
        self, kind: Request, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int, flags: int
    ) -> tuple[int, NDArray[np.int32]]:
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), _tenant_of(tenant)
        num_tokens, number = self._keys.length_of(num_tokens, keys), self._link.next_number()
        answer = None
        if self.is_ready():
            ask = BlocksRequest(number, keys, start, tenant, flags, num_tokens)
            answer = self._link.ask(kind, number, *ask.parts())
            if answer is None:                       # it may come later
                self._link.send(Request.CANCEL, np.array([number], dtype=np.uint64))
        match, positions, _ = self._matched(answer)
        with self._link.lock:
            self._tasks.add(number, ClientTask(num_tokens, False, positions, match))
        return number, positions

    def launch(
        self, task_ids: int | Iterable[int], pages: Sequence[NDArray[np.int32]], fence: int = 0,
        layerwise: bool = False, counter: int = 0,
    ) -> list[int]:
        """See ``Blocks``."""
        ids, given, fence, layerwise, counter = launch_of(task_ids, pages, fence, layerwise, counter)
        number = self._link.next_number()
        with self._link.lock:
            self._tasks.launch(ids, given)
        ask = LaunchRequest(number, ids, given, fence, counter, Flag.LAYERWISE if layerwise else 0)
        if not self._link.send(Request.LAUNCH, *ask.parts(), must=True):
            self._fail(ids)
        return ids

    def _fail(self, task_ids: Sequence[int]) -> None:
        """End tasks that have not reached the daemon."""
        with self._link.lock:
            self._tasks.fail(task_ids, reasons.NO_DAEMON)

    # ---- gets and puts in one call ----------------------------------------------------------------------------

    def _run(self, kind: Request, ask: BlocksRequest, num_tokens: int = 0) -> bool:
        """Make a task and send it; False: the daemon has nothing to do for it."""
        with self._link.lock:
            task = self._tasks.add(ask.number, ClientTask(num_tokens))
        try:
            answer = self._link.ask(kind, ask.number, *ask.parts(), must=True)
        except FlexKVError:
            with self._link.lock:
                self._tasks.forget(ask.number)
            raise
        if answer is None:                           # it may come later, unless the task has ended
            with self._link.lock:
                return kind is not Request.PUT or not self._tasks.is_settled(ask.number)
        _, task.blocks, has_task = self._matched(answer)
        if not has_task:
            with self._link.lock:
                self._tasks.forget(ask.number)
        return has_task

    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, tenant: int = 0,
    ) -> int:
        """See ``Blocks``."""
        keys, start, pages = span_of(keys, start_block, pages)
        fence, tenant, flags = fence_of(fence), _tenant_of(tenant), Flag.LAYERWISE if layerwise else 0
        blocks = np.arange(start, start + len(pages), dtype=np.int32)
        with self._link.lock:                        # number and request belong to the same session
            number = self._link.next_number()
            self._tasks.add(number, ClientTask(blocks=blocks))
            ask = BlocksRequest(number, keys, start, tenant, flags, fence, pages)
            if not self._link.send(Request.GET, *ask.parts(), must=True):
                self._fail([number])
        return number

    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0, tenant: int = 0,
        *, provisional: bool = False, after: Iterable[int] = (),
    ) -> int | None:
        """See ``Blocks``. An id is returned also if the daemon has not answered in time: it may save the blocks yet."""
        keys, start, pages = span_of(keys, start_block, pages)
        fence, tenant, loads = fence_of(fence), _tenant_of(tenant), np.array(task_ids_of(after), dtype=np.uint64)
        if not self.is_ready():
            return None
        number = self._link.next_number()
        flags = Flag.PROVISIONAL if provisional else 0
        ask = BlocksRequest(number, keys, start, tenant, flags, fence, pages, loads)
        return number if self._run(Request.PUT, ask) else None

    def accept_put(self, task_id: int, stop_block: int | None = None) -> None:
        """See ``Blocks``."""
        stop = -1 if stop_block is None else block_of(stop_block, "stop_block")
        self._link.send(Request.ACCEPT, protocol.ACCEPT.pack(task_id_of(task_id), stop), must=True)

    def prefetch_blocks(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, *, num_tokens: int = 0,
        must_answer: bool = False,
    ) -> int | None:
        """See ``Blocks``."""
        keys, start, tenant = keys_of(keys), block_of(start_block, "start_block"), _tenant_of(tenant)
        num_tokens = self._keys.length_of(num_tokens, keys) if num_tokens else 0
        if not self.is_ready() and not must_answer:
            return None
        number, flags = self._link.next_number(), Flag.MUST_ANSWER if must_answer else 0
        ask = BlocksRequest(number, keys, start, tenant, flags, num_tokens)
        return number if self._run(Request.PREFETCH, ask, num_tokens) else None

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """See ``Blocks``."""
        self._prefill_rate = number_of(tokens_per_s, "tokens_per_s", 0.0, 1e12)
        self._set_prefill_rate()

    def _set_prefill_rate(self) -> None:
        number = self._link.next_number()
        command = {"command": "set_prefill_rate", "tokens_per_s": float(self._prefill_rate)}
        self._link.send(Request.CALL, *protocol.pack_call(number, command))

    # ---- tasks ------------------------------------------------------------------------------------------------

    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """See ``Blocks``."""
        task = self._tasks.get(task_id_of(task_id))
        return task.blocks if task is not None else NO_BLOCKS

    def task_match(self, task_id: int) -> MatchResult | None:
        """See ``Blocks``."""
        task = self._tasks.get(task_id_of(task_id))
        return task.match if task is not None else None

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """See ``Blocks``."""
        ids, timeout = unique_task_ids_of(task_ids), seconds_of(timeout, "timeout")
        done = self._tasks.is_settled if completely else self._tasks.has_result
        self._link.wait(lambda: all(map(done, ids)), timeout)
        with self._link.lock:
            return {task_id: self._tasks.take(task_id) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """See ``Blocks``."""
        ids = unique_task_ids_of(task_ids)
        self._link.poll()
        with self._link.lock:
            return {task_id: self._tasks.take(task_id) for task_id in ids if self._tasks.is_settled(task_id)}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """See ``Blocks``."""
        ids = task_ids_of(task_ids)
        with self._link.lock:
            self._tasks.forget_matched(ids)
        if ids:
            self._link.send(Request.CANCEL, np.array(ids, dtype=np.uint64), must=True)

    # ---- pins and counts --------------------------------------------------------------------------------------

    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """See ``Blocks``."""
        command = {"command": "pin", "name": name, "tenant": self.tenant(namespace)}
        return self._link.call(command, pin_of, self.keys(token_ids, namespace, None))

    def unpin(self, name: str) -> Pin:
        """See ``Blocks``."""
        return self._link.call({"command": "unpin", "name": name}, pin_of)

    def pins(self) -> list[Pin]:
        """See ``Blocks``. Empty while the daemon does not answer."""
        try:
            return self._link.call({"command": "pins"}, lambda pins: [pin_of(pin) for pin in pins])
        except RegistrationError:
            return []

    def stats(self) -> dict[str, int]:
        """See ``Blocks``. Of the daemon's cache; empty while the daemon does not answer."""
        try:
            return self._link.call({"command": "stats"}, dict[str, int])
        except RegistrationError:
            return {}

    def check_integrity(self) -> None:
        """See ``Blocks``."""
        self._link.call({"command": "check_integrity"}, bool, timeout_s=5.0)


def _tenant_of(tenant: int) -> int:
    return integer_of(tenant, "tenant", 0, (1 << 31) - 1)
