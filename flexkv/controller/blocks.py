"""The interface of a controller: KV of token sequences, by keys of blocks and by pages."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher
from flexkv.cache.plan import MatchResult
from flexkv.controller.response import KVResponse
from flexkv.protocol.requests import Pin


class Blocks(ABC):
    """Loads and saves the KV of token sequences for one engine (one data-parallel client).

    Adapters and ``KVManager`` call it. An implementation must be thread safe. It may block on transfers only in
    ``wait``, ``reset`` and ``shutdown``. Matches are empty and puts save nothing until every rank has registered its
    tensors, after ``shutdown``, and while the data plane is out of service.

    Every method checks its arguments before it reserves anything. An invalid argument raises ArgumentError, and the
    call changes nothing. Four arguments occur in many methods:

    keys : (n, 2) uint64
        Keys of the blocks of a sequence from its first block, as ``hasher`` or ``keys`` makes them.
    start_block : int
        Position in the sequence of the first block that is loaded or saved.
    tenant : int
        Number of the quota that the blocks count against, as ``tenant`` returns it.
    fence : int
        Step of the ranks (``KVTPClient.advance_fence``) that must be done before the pages are accessed; 0: none.
    """

    # ---- life -------------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self) -> None:
        """Start to accept registrations of ranks; returns at once.

        Raises
        ------
        RegistrationError
            The ranks' socket cannot be opened.
        TransferError
            ``start`` was called before.
        """

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether every rank has registered, so that KV can be loaded and saved."""

    @abstractmethod
    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until every rank has registered, so that KV can be loaded and saved.

        Parameters
        ----------
        timeout : float
            Seconds.

        Raises
        ------
        NotReadyError
            A rank has not registered in time, or the controller was not started, was shut down, or is out of service.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Write the blocks that are queued for lower tiers, for a bounded time; then cancel running transfers, and free
        all memory. Can be called again.

        Afterwards matches are empty, puts save nothing, and tasks that are launched are cancelled.
        """

    @abstractmethod
    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """Drop all cached KV and all pins, for example after a change of weights. KV that was put before the call is
        never returned after it.

        Tasks that are matched or running are cancelled.

        Parameters
        ----------
        timeout : float
            Maximum wait for the cancelled tasks to settle, in seconds.
        new_weights : bool
            The engine's weights are no longer the weights that ``ModelConfig`` names. KV that is put from now on is not
            offered after a restart. Hashers that were made before the call make keys of the old weights; make new ones.
        """

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---- keys -------------------------------------------------------------------------------------------------

    @abstractmethod
    def hasher(self, namespace: Sequence[str] | None = None) -> SequenceHasher:
        """Make a hasher for a sequence in a namespace that grows token by token. It makes the keys that the methods
        below take."""

    @abstractmethod
    def keys(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None = None,
        block_extras: Mapping[int, bytes] | None = None,
    ) -> NDArray[np.uint64]:
        """(n, 2) uint64: keys of the whole blocks of a sequence.

        Parameters
        ----------
        token_ids : (num_tokens,) int32, int64 or uint32
        namespace : sequence of str, optional
        block_extras : mapping from block index to bytes, optional
            Content other than tokens that a block depends on.
        """

    @abstractmethod
    def tenant(self, namespace: Sequence[str] | None) -> int:
        """Number of the quota that blocks of this namespace count against: argument ``tenant`` of the methods below."""

    # ---- matching ---------------------------------------------------------------------------------------------

    @abstractmethod
    def record_request(self, keys: NDArray[np.uint64]) -> None:
        """Write a request into the trace (setting ``trace_path``). Must be called once for each request that is not
        matched with ``match_get``, which does the same."""

    @abstractmethod
    def lookup(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, count: bool = False
    ) -> MatchResult:
        """Count the leading blocks of ``keys`` that are available. Acquires no block: a later get may find fewer.

        Parameters
        ----------
        start_block : int
            First block that would be loaded. Blocks before it must be cached, and are counted in ``num_ready``.
        count : bool
            Count the match in ``stats``, by reason. Must be True in one call for each request that is not matched
            with ``match_get``, which counts it.
        """

    @abstractmethod
    def match_get(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0, host_only: bool = False
    ) -> tuple[int, NDArray[np.int32]]:
        """Acquire the leading cached blocks of a request from ``start_block`` on, until ``launch`` or ``cancel``.
        Writes the request into the trace, and counts it in ``stats``.

        A task that is not launched within 60 s expires.

        Parameters
        ----------
        num_tokens : int
            Length of the prompt: length of the mask of the response. All whole blocks of it must be in ``keys``.
        host_only : bool
            End before the first block that is not in host memory now.

        Returns
        -------
        task_id : int
        positions : (m,) int32
            Blocks of the sequence that ``launch`` will load, ascending. They end before blocks that the engine computes
            faster than they load.
        """

    @abstractmethod
    def match_put(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0
    ) -> tuple[int, NDArray[np.int32]]:
        """Reserve slots for the blocks from ``start_block`` on that are not cached yet, until ``launch`` or ``cancel``.

        Arguments and results are those of ``match_get``; ``launch`` will save the blocks at ``positions``.
        """

    @abstractmethod
    def launch(
        self, task_ids: int | Iterable[int], pages: Sequence[NDArray[np.int32]], fence: int = 0,
        layerwise: bool = False, counter: int = 0,
    ) -> list[int]:
        """Start the transfers of matched tasks, all or none; returns their ids.

        Parameters
        ----------
        pages : sequence of (m,) int32
            For each task, the page of each of its blocks, in the order of ``positions``.
        layerwise : bool
            Load layer by layer; allowed for one task alone. The layers of a load that fails are never signalled.
        counter : int
            Number from 1 of the eventfds that signal the layers of a ``layerwise`` load; 0: none.

        Raises
        ------
        SlotMappingError
            A task has another number of blocks than it has pages; no task of the call was launched.
        TaskError
            A task is unknown, was launched or has ended already, or is given twice; no task of the call was launched.
        """

    # ---- gets and puts in one call ----------------------------------------------------------------------------

    @abstractmethod
    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, tenant: int = 0,
    ) -> int:
        """Load blocks ``[start_block, start_block + len(pages))`` of a sequence into ``pages`` ((m,) int32).

        The blocks before the first unavailable block are loaded; it and the blocks after it fail, and with them the
        task.

        Parameters
        ----------
        layerwise : bool
            Load layer by layer, for ``KVTPClient.follow_load``. Blocks from the first one that is not in host memory on
            fail, because a later load must not overtake this one.

        Returns
        -------
        int
            Id of the task.
        """

    @abstractmethod
    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0, tenant: int = 0,
        *, provisional: bool = False, after: Iterable[int] = (),
    ) -> int | None:
        """Save the absent blocks of ``[start_block, start_block + len(pages))``; returns the id of the task, or None if
        no block is absent or no slot is free.

        A put with the status TIMEOUT or CANCELLED, and a put whose rank was lost, saves nothing.

        Parameters
        ----------
        pages : (m,) int32
            Page of each block from ``start_block`` on.
        provisional : bool
            No match returns the blocks, and they are not written to a lower tier, until ``accept_put``. They are
            dropped if it is not called within ``op_timeout_s`` after the copies are at rest.
        after : iterable of int
            Ids of loads of which every block must have succeeded; otherwise all blocks of this put fail.
        """

    @abstractmethod
    def accept_put(self, task_id: int, stop_block: int | None = None) -> None:
        """Make the blocks of a provisional put ready: the engine has accepted the step that computed them.

        May be called before and after the copies are at rest, and after the result was taken. The first call decides;
        an unknown id is ignored.

        Parameters
        ----------
        task_id : int
        stop_block : int, optional
            Position in the sequence from which on blocks are dropped. None: none is dropped; 0: all are.
        """

    @abstractmethod
    def prefetch_blocks(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, *, num_tokens: int = 0,
        must_answer: bool = False,
    ) -> int | None:
        """Read the leading cached blocks of a sequence, from ``start_block`` on, from lower tiers into host memory.
        Returns the id of a task that ends when they are there.

        While reads from lower tiers fill a quarter of the host slots, no block is read.

        Parameters
        ----------
        num_tokens : int
            Length of the mask of the response; 0: no mask.
        must_answer : bool
            While no block is read, return a task that ends at once, with the blocks that are in host memory now. False:
            return None then.
        """

    @abstractmethod
    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """Set the engine's prefill speed, in tokens per second, as the adapter has measured it; 0: unknown. No effect
        if the setting ``prefill_tokens_per_s`` is given."""

    # ---- tasks ------------------------------------------------------------------------------------------------

    @abstractmethod
    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """(m,) int32: positions in the sequence of the blocks that a task moves, ascending; empty for an unknown
        task."""

    @abstractmethod
    def task_match(self, task_id: int) -> MatchResult | None:
        """Match of a get at the time when it was planned; None if the task is unknown."""

    @abstractmethod
    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait until tasks have ended, at most ``timeout`` seconds; returns a response for each id.

        The result of a task is returned once; afterwards its status is NOTFOUND. A task that still runs after
        ``timeout`` has the status TIMEOUT; it continues, and can be waited for again. A task that was not launched has
        the status UNREADY.

        ``completely``: also wait until the tasks access no page any more. A task that took longer than ``op_timeout_s``
        (TIMEOUT), was cancelled (CANCELLED) or lost a rank or node (FAILED) may access its pages for a short time after
        its result is known.
        """

    @abstractmethod
    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """Return the responses of the tasks that access no page any more, without waiting; other tasks are left out. A
        result is returned once; the status of an unknown task is NOTFOUND."""

    @abstractmethod
    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Stop tasks: no further copy starts; copies in progress are finished (see ``wait``). A task that was not
        launched is forgotten, a provisional put that was not accepted is dropped, and unknown tasks are ignored."""

    # ---- pins and counts --------------------------------------------------------------------------------------

    @abstractmethod
    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """Pin the leading blocks of a prefix that are cached now, on any tier, until ``unpin`` or ``reset``.

        Pinned blocks are not evicted and do not expire. ``name`` is the argument of ``unpin``; empty: a name is
        generated.

        Raises
        ------
        PinError
            No block of the prefix is cached, the name is taken, or too many blocks would be pinned
            (``max_pinned_share``, or the guarantees of other namespaces).
        """

    @abstractmethod
    def unpin(self, name: str) -> Pin:
        """Unpin a prefix: its blocks can be evicted again. PinError if no pin has that name."""

    @abstractmethod
    def pins(self) -> list[Pin]:
        """The pinned prefixes."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Current counts of the index, the lower tiers and the tasks; counts of matches by reason since the start."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise InvariantError if the index or the slots are not consistent."""
