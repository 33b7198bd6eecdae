"""The daemon: one process of a node that keeps the KV of several engines."""

import hashlib
import itertools
import logging
import os
import re
import shutil
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from flexkv.config import CacheConfig, FlexKVConfig, layout_of
from flexkv.controller.pool_resizing import PoolResizing
from flexkv.controller.shared_cache import SharedCache
from flexkv.errors import FlexKVError, RegistrationError
from flexkv.protocol.peer_process import peer_credentials
from flexkv.protocol.session import MAX_MESSAGE_BYTES, Hello, pack_refusal
from flexkv.protocol.sockets import ListeningSocket, socket_path
from flexkv.server.host_budget import EXTENT_BYTES, HostBudget, Share
from flexkv.server.request_numbers import TASK_BITS
from flexkv.server.session import Session
from flexkv.storage.ssd.directory_lock import owner_of
from flexkv.transfer.repeated_log import RepeatedLog
from flexkv.transfer.watch import Watch

logger = logging.getLogger("flexkv.server")

_PAUSE_S = 0.5
"""Pause of the listening socket after an error, in seconds."""

_EPOCH_S = 1_700_000_000
"""Session numbers begin with the seconds since this time."""

_MAX_SESSION = (1 << 30) - 1

_TURN_S = 1.0

_BALANCE_S = 0.1
"""Time between two looks at the pools that divide host memory, in seconds."""

_MAX_APART = 1000
"""Domains that are remembered as such that do not share the pool of their layout."""


def _digest(layout: str) -> str:
    return hashlib.sha256(layout.encode(errors="replace")).hexdigest()[:32]


class _Pool:
    """The cache of all models whose slots have the same layout, and its sessions."""

    def __init__(
        self, cache: SharedCache, layout: str, tokens_per_block: int, index: int, share: Share | None
    ) -> None:
        self.cache = cache
        self.share = share
        self.layout = layout
        self.tokens_per_block = tokens_per_block
        self.index = index
        self.sessions: set[Session] = set()
        self.idle_since = time.monotonic()
        if share is not None:
            share.pool = self

    # ---- read by the budget -----------------------------------------------------------------------------------

    @property
    def resizing(self) -> PoolResizing:
        """See ``PoolUse``."""
        return self.cache.resizing

    @property
    def has_engines(self) -> bool:
        """See ``PoolUse``."""
        return bool(self.sessions)

    @property
    def moved_blocks(self) -> int:
        """See ``PoolUse``."""
        return self.cache.moved_blocks

    def evicted_and_free(self) -> tuple[int, int]:
        """See ``PoolUse``."""
        stats = self.cache.space.index.stats() if self.cache.space.index is not None else {}
        return stats.get("evicted_blocks", 0), stats.get("free_slots", 0)


class Daemon:
    """Accepts engines, and gives each a session on the cache of its pool.

    ``run`` serves until ``stop``. A fault of one connection closes that connection.

    Parameters
    ----------
    config : FlexKVConfig
        The pools divide host memory by use, and have equal parts of the SSD.
    port : str
        Path of the Unix socket, or ``ipc://PATH``.
    idle_exit_s : float
        ``run`` returns after so long without an engine, in seconds; 0: never.
    extent_bytes : int
        As in ``HostBudget``.

    Raises
    ------
    RegistrationError
        Another daemon listens at the path, or it cannot be used.
    """

    def __init__(
        self, config: FlexKVConfig, port: str, *, idle_exit_s: float = 0.0, extent_bytes: int = EXTENT_BYTES
    ) -> None:
        if config.cache.enable_gds:                  # its ops would not know to which engine a page belongs
            logger.warning("enable_gds has no effect in the daemon: blocks on SSD go through host memory")
        self._config = config
        self._idle_exit_s = idle_exit_s
        self._idle_since = time.monotonic()
        self._pools: dict[str, _Pool] = {}
        self._apart: dict[str, None] = {}            # domains that do not share the pool of their layout
        self._budget = _budget_of(config.cache, extent_bytes)
        self._watch = Watch()
        self._log = RepeatedLog(logger)
        self._lock = threading.Lock()                # for the sessions of pools
        self._stopping = False
        self._silent: set[socket.socket] = set()     # connections that have sent no HELLO
        self._numbers_ahead: set[int] = set()        # given, and larger than those that come next
        # Ids of tasks are larger than those of a daemon that ran before, unless the clock was set back.
        self._session_numbers = itertools.count(max(1, int(time.time()) - _EPOCH_S))
        try:
            self._listening = ListeningSocket(socket_path(port))
        except BaseException:
            self._watch.close()
            raise
        listener = self._listening.socket
        self._watch.add(listener.fileno(), self._accept, lambda error: self._watch.pause(listener.fileno(), _PAUSE_S))

    @property
    def path(self) -> Path:
        """Path of the socket."""
        return self._listening.path

    def run(self) -> None:
        """Serve engines until ``stop``; then free everything."""
        logger.info("engines can connect at %s", self.path)
        try:
            while not self._stopping:
                self._watch.turn(_BALANCE_S if self._budget is not None and self._pools else _TURN_S)
                self._end_if_idle()
                self._balance()
        finally:
            self._close()

    def stop(self) -> None:
        """Let ``run`` return. Any thread, and a signal handler, may call it."""
        self._stopping = True
        self._watch.wake()

    def _end_if_idle(self) -> None:
        with self._lock:
            is_used = any(pool.sessions for pool in self._pools.values())
        now = time.monotonic()
        self._idle_since = now if is_used else self._idle_since
        if self._idle_exit_s and now - self._idle_since > self._idle_exit_s:
            logger.info("no engine has used this daemon for %g s: it ends", self._idle_exit_s)
            self._stopping = True

    def _close(self) -> None:
        self._listening.close()
        for connection in list(self._silent):
            self._drop(connection)
        for pool in list(self._pools.values()):
            try:
                pool.cache.shutdown()
            except FlexKVError as error:
                logger.error("a cache could not be shut down: %s", error)
            for session in list(pool.sessions):
                session.end("the daemon ends")
        self._watch.close()

    # ---- connections ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._log.write(logging.WARNING, f"an engine cannot connect: {error.strerror or error}")
                self._watch.pause(self._listening.socket.fileno(), _PAUSE_S)
                return
            connection.setblocking(False)
            _, uid = peer_credentials(connection)
            if uid not in (os.getuid(), 0):
                self._log.write(logging.ERROR, f"refused a connection from user {uid}")
                connection.close()
                continue
            fd = connection.fileno()
            self._silent.add(connection)
            self._watch.add(fd, partial(self._hear, connection), partial(self._failed, connection))
            self._watch.after(self._config.transfer.handshake_timeout_s, partial(self._drop, connection, fd))

    def _failed(self, connection: socket.socket, error: Exception) -> None:
        self._drop(connection)

    def _drop(self, connection: socket.socket, fd: int | None = None) -> None:
        """Close a connection that has become no session; with ``fd`` only if that is still its descriptor."""
        if connection.fileno() >= 0 and fd in (None, connection.fileno()):
            self._watch.remove(connection.fileno())
            connection.close()
            self._silent.discard(connection)

    def _hear(self, connection: socket.socket) -> None:
        """Take an engine's HELLO."""
        try:
            message = connection.recv(MAX_MESSAGE_BYTES)
            if not message:
                self._drop(connection)
                return
            self._admit(connection, Hello.unpack(message))
        except BlockingIOError:
            return
        except (FlexKVError, OSError, MemoryError) as error:
            self._log.write(logging.ERROR, f"refused an engine: {error}")
            with suppress(OSError):
                connection.send(pack_refusal(str(error)))
            self._drop(connection)

    def _admit(self, connection: socket.socket, hello: Hello) -> None:
        listening = ListeningSocket(socket_path(hello.register_port))
        try:
            pool = self._pool_of(hello)
            with ExitStack() as undo:
                theirs = connection.dup()
                undo.callback(theirs.close)
                first_task = self._session_number(hello) << TASK_BITS
                session = Session(
                    theirs, listening, hello, pool.cache, self._config.cache.secret,
                    self._config.transfer.op_timeout_s, first_task, partial(self._ended, pool),
                    may_leave_pool=pool.layout != hello.domain,
                )
                undo.pop_all()
        except BaseException:
            listening.close()
            raise
        self._drop(connection)
        with self._lock:
            pool.sessions.add(session)
        pool.cache.transfer.call_soon(session.begin)

    def _session_number(self, hello: Hello) -> int:
        """An unused number, larger than that of the engine's session before, which another daemon may have given it.
        The numbers of other engines do not depend on it."""
        ours = next(self._session_numbers)
        number = max(ours, (hello.first_task >> TASK_BITS) + 1)
        while number in self._numbers_ahead:
            number += 1
        if number > _MAX_SESSION:
            raise RegistrationError(f"it has used the number {hello.first_task}: no larger one can be given")
        if number > ours:
            self._numbers_ahead.add(number)
        return number

    def _ended(self, pool: _Pool, session: Session) -> None:
        with self._lock:
            if session.needs_own_pool:               # with equal settings tensors may still differ
                self._apart[session.hello.domain] = None
                if len(self._apart) > _MAX_APART:
                    del self._apart[next(iter(self._apart))]
            pool.sessions.discard(session)
            pool.idle_since = time.monotonic()

    # ---- pools ------------------------------------------------------------------------------------------------

    def _balance(self) -> None:
        """Divide host memory between the pools, and remove those that have yielded all of it."""
        if self._budget is None:
            return
        try:
            self._budget.balance()
            for name, pool in list(self._pools.items()):
                if pool.share is not None and pool.share.is_spent and not pool.sessions:
                    logger.info("pool %s has no engine, and others have its memory: it ends", name)
                    self._remove(name)
        except (FlexKVError, OSError) as error:      # engines go on with the memory that they have
            self._log.write(logging.ERROR, "host memory cannot be divided anew", error)

    def _remove(self, name: str) -> None:
        """End a pool that no engine uses. Its memory is free afterwards, unless an agent may still have it pinned: then
        it counts as used from now on."""
        pool = self._pools.pop(name)
        pool.cache.memory.frees_at_close = is_free = not pool.cache.transfer.growth.num_pinning
        pool.cache.shutdown()
        if self._budget is not None and pool.share is not None and is_free:
            self._budget.close(pool.share)

    def _pool_of(self, hello: Hello) -> _Pool:
        """The pool of an engine; a new one, if there is room.

        Raises
        ------
        RegistrationError
            It has other tokens per block than the pool, or all pools that fit have engines.
        """
        layout = hello.domain if hello.domain in self._apart else layout_of(hello.domain)
        if hello.model in self._config.cache.guarantees:
            layout = f"{hello.model}\n{layout}"      # a pool of its own
        name = _digest(layout)
        pool = self._pools.get(name)
        if pool is not None and not pool.cache.transfer.in_service and not pool.sessions:
            self._remove(name)
            pool = None
        if pool is None:
            pool = self._pools[name] = self._new_pool(hello, name, layout)
        if pool.tokens_per_block != hello.tokens_per_block:
            raise RegistrationError(
                f"blocks of {hello.tokens_per_block} tokens; those of the pool have {pool.tokens_per_block}"
            )
        return pool

    def _new_pool(self, hello: Hello, name: str, layout: str) -> _Pool:
        limit = self._config.cache.server_max_pools
        if len(self._pools) >= limit:
            self._remove_idle_pool()
        taken = {pool.index for pool in self._pools.values()}
        index = next(number for number in range(limit) if number not in taken)
        config = self._share(hello.tokens_per_block, name)
        share = self._budget.open(hello.model) if self._budget is not None else None
        cache = SharedCache(
            config, self._config.transfer, layout.encode(errors="replace"),
            {"model_name": hello.model, "engine": f"daemon-{index}"},
            config.py_metrics_port and config.py_metrics_port + index,
            note=f"serves {hello.model or 'a model'} at {self.path}", share=share,
        )
        pool = _Pool(cache, layout, hello.tokens_per_block, index, share)
        cache.start()
        logger.info("new pool %s: model %s, blocks of %d tokens", name, hello.model, hello.tokens_per_block)
        return pool

    def _remove_idle_pool(self) -> None:
        with self._lock:
            idle = [
                name for name, pool in self._pools.items()
                if not pool.sessions and not pool.cache.transfer.growth.num_pinning
                and not (pool.share is not None and pool.share.guaranteed_bytes)
            ]
        if not idle:
            raise RegistrationError(
                f"the daemon has {len(self._pools)} pools, for other layouts of a block, which all have engines or a "
                "guarantee: raise server_max_pools"
            )
        name = min(idle, key=lambda name: self._pools[name].idle_since)
        logger.info("pool %s has no engine; its memory goes to another", name)
        self._remove(name)

    def _share(self, tokens_per_block: int, name: str) -> CacheConfig:
        """The settings of a pool's cache: an equal part of the SSD (and of host memory, if pools have fixed sizes), and
        paths of its own."""
        config, limit = self._config.cache, self._config.cache.server_max_pools
        blocks = config.num_cpu_blocks and max(1, config.num_cpu_blocks // limit)
        directories = [directory / name for directory in config.ssd_directories] if config.ssd_bytes else []
        for directory in directories:
            _remove_old(directory.parent, {name, *self._pools}, limit)
            directory.mkdir(parents=True, exist_ok=True)
        return config.replace(
            tokens_per_block=tokens_per_block, cpu_cache_gb=config.cpu_cache_gb / limit, num_cpu_blocks=blocks,
            ssd_cache_gb=config.ssd_cache_gb / limit,
            ssd_cache_dir=";".join(map(str, directories)) if directories else config.ssd_cache_dir, enable_gds=False,
            trace_path=config.trace_path and f"{config.trace_path}.{name}",
        )


def _budget_of(config: CacheConfig, extent_bytes: int) -> HostBudget | None:
    """The budget that several pools divide; None: there is one pool, or the pools have fixed sizes."""
    if config.server_max_pools == 1 or config.hugepage_bytes:
        return None
    budget = HostBudget(config.host_bytes, config.num_cpu_blocks, extent_bytes)
    for model, num_bytes in config.guarantees.items():
        budget.reserve(model, num_bytes)
    return budget


def _remove_old(directory: Path, used: set[str], limit: int) -> None:
    """Remove the SSD caches of pools that are not in use, the oldest first, until with the new one ``limit`` are
    left. Another daemon may use some."""
    with suppress(FileNotFoundError):
        found = [path for path in directory.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        unused = [path for path in found if path.name not in used and not owner_of(path)]
        unused.sort(key=lambda path: path.stat().st_mtime)
        for path in unused[: max(0, len(unused) + len(used) - limit)]:
            logger.info("the SSD cache of pool %s is removed, to make room for another pool", path.name)
            shutil.rmtree(path, ignore_errors=True)
