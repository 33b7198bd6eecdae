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

    Arguments are checked before anything is reserved: a bad one raises ArgumentError, and the call has changed nothing.
    Four arguments occur in many methods:

    keys : (n, 2) uint64
        Keys of the blocks of a sequence from its first block, as ``hasher`` or ``keys`` makes them.
    start_block : int
        Position in the sequence of the first block that is loaded or saved.
    tenant : int
        Which quota the blocks count against, as ``tenant`` returns it.
    fence : int
        Step of the ranks (``KVTPClient.advance_fence``) before which the pages must not be touched; 0: none.
    """

    # ---- life -------------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self) -> None:
        """Start to accept ranks; returns at once.

        Raises
        ------
        RegistrationError
            The ranks' socket cannot be opened.
        TransferError
            It was started before.
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
            A rank has not registered by then, or this was not started or was shut down.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Write the blocks queued for SSD, cancel running transfers, free all memory. May be called again.

        Afterwards matches are empty, puts save nothing, and tasks that are launched are cancelled.
        """

    @abstractmethod
    def reset(self, timeout: float = 5.0, *, new_weights: bool = False) -> None:
        """Forget all cached KV, as after a change of weights. Nothing put before it is ever returned after it,
        and nothing is pinned any more.

        Tasks that are matched or running are cancelled; ``timeout`` bounds the wait for them (seconds).
        ``new_weights``: the engine's weights are no longer those that ``ModelConfig`` names. KV that is put from now on
        is not offered after a restart. Hashers that were made before make keys of the old weights.
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
        """A hasher of growing sequences in a namespace; it makes the keys that the methods below take."""

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
        """Which quota blocks of this namespace count against: a number that the methods below take as ``tenant``."""

    # ---- matching ---------------------------------------------------------------------------------------------

    @abstractmethod
    def record_request(self, keys: NDArray[np.uint64]) -> None:
        """Write the request into the trace (setting ``trace_path``); must be called once a request, unless that is
        matched with ``match_get``."""

    @abstractmethod
    def lookup(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, count: bool = False
    ) -> MatchResult:
        """How many leading blocks of ``keys`` can be loaded, why no more, since when. Holds nothing.

        ``start_block``: those before it are not to be loaded. ``count``: in ``stats``, by reason; once a request.
        """

    @abstractmethod
    def match_get(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0, host_only: bool = False
    ) -> tuple[int, NDArray[np.int32]]:
        """Acquire the leading cached blocks of a request from ``start_block`` on, until ``launch`` or ``cancel``; and
        record and count the request.

        Parameters
        ----------
        num_tokens : int
            Length of the mask of the response.
        host_only : bool
            Only blocks that are in host memory now.

        Returns
        -------
        task_id : int
        positions : (m,) int32
            Blocks of the sequence that ``launch`` will load, ascending. Blocks that are computed faster than loaded are
            left out.
        """

    @abstractmethod
    def match_put(
        self, keys: NDArray[np.uint64], start_block: int, num_tokens: int, tenant: int = 0
    ) -> tuple[int, NDArray[np.int32]]:
        """Reserve slots for the blocks from ``start_block`` on that are not cached yet, until ``launch`` or ``cancel``.

        Arguments and results as ``match_get``; ``launch`` will save the blocks at ``positions``.
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
            For each task, the page of each of its blocks, in their order.
        layerwise : bool
            One load, layer by layer; the layers of a load that fails are never signalled.
        counter : int
            Number from 1 of the eventfds that signal the layers of a ``layerwise`` load; 0: none.

        Raises
        ------
        SlotMappingError
            The number of pages is not that of a task's blocks; no task of the call was launched.
        TaskError
            A task is not known, was launched or ended already, or is given twice; no task of the call was launched.
        """

    # ---- gets and puts in one call ----------------------------------------------------------------------------

    @abstractmethod
    def get_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0,
        layerwise: bool = False, tenant: int = 0,
    ) -> int:
        """Load blocks ``[start_block, start_block + len(pages))`` of a sequence into ``pages`` ((m,) int32).

        A block that is not ready fails, and with it the task; the others are loaded. ``layerwise``: for
        ``KVTPClient.follow_load``; blocks that are not in host memory fail, because later loads must not overtake.
        Returns the id of the task.
        """

    @abstractmethod
    def put_blocks(
        self, keys: NDArray[np.uint64], start_block: int, pages: NDArray[np.int32], fence: int = 0, tenant: int = 0,
        *, provisional: bool = False, after: Iterable[int] = (),
    ) -> int | None:
        """Save the absent blocks of ``[start_block, start_block + len(pages))``; None if none is absent.

        A put with the status TIMEOUT or CANCELLED, and a put whose rank was lost, saves nothing.

        Parameters
        ----------
        pages : (m,) int32
            Page of each block from ``start_block`` on.
        provisional : bool
            The blocks stay invisible, and are not written to SSD, until ``accept_put``. If that does not come within
            ``op_timeout_s`` after the copies are at rest, they are dropped.
        after : iterable of int
            Ids of loads of which every block must have succeeded; otherwise all blocks of this put fail.
        """

    @abstractmethod
    def accept_put(self, task_id: int, stop_block: int | None = None) -> None:
        """The engine accepted the step that computed the blocks of a provisional put, so they may be offered.

        May be called before and after the copies are at rest, and after the result was taken. The first call decides;
        an unknown id is ignored.

        Parameters
        ----------
        task_id : int
        stop_block : int, optional
            Blocks at this position of the sequence and behind it are dropped. None: no block; 0: all.
        """

    @abstractmethod
    def prefetch_blocks(
        self, keys: NDArray[np.uint64], start_block: int = 0, tenant: int = 0, *, num_tokens: int = 0,
        must_answer: bool = False,
    ) -> int | None:
        """Bring blocks of a sequence from ``start_block`` on into host memory; the task ends when they are there.

        While prefetches fill a quarter of host memory no block is read: the result is None, or with ``must_answer`` a
        task that ends with the blocks that are in host memory now. ``num_tokens``: length of the mask of the response;
        0: no mask.
        """

    @abstractmethod
    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """Set the prefill speed that the adapter has measured; ``prefill_tokens_per_s`` of the configuration wins."""

    # ---- tasks ------------------------------------------------------------------------------------------------

    @abstractmethod
    def task_blocks(self, task_id: int) -> NDArray[np.int32]:
        """(m,) int32: positions in its sequence of the blocks that a task moves; empty if the task is not known."""

    @abstractmethod
    def task_match(self, task_id: int) -> MatchResult | None:
        """What a get found when it was made: how many blocks, why no more, and since when; None: it is not known."""

    @abstractmethod
    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for tasks, at most ``timeout`` seconds; a result is given once.

        A task that still runs then has the status TIMEOUT; it continues, and can be waited for again. A task that took
        longer than ``op_timeout_s`` (TIMEOUT) or was cancelled (CANCELLED) may still access its pages for a moment;
        ``completely`` waits until it does not.
        """

    @abstractmethod
    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """Results of those of the tasks that have ended, without waiting; a result is given once."""

    @abstractmethod
    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Stop tasks: copies that have not started never start, those under way are finished first (see ``wait``)."""

    # ---- pins and counts --------------------------------------------------------------------------------------

    @abstractmethod
    def pin(self, token_ids: ArrayLike, namespace: Sequence[str] | None = None, name: str = "") -> Pin:
        """Keep the blocks of a prefix that are cached now, on any tier, until ``unpin`` or ``reset``.

        Pinned blocks do not expire. ``name`` is the argument of ``unpin``; empty: a name is generated.

        Raises
        ------
        PinError
            No block of the prefix is cached, the name is taken, or too many blocks would be pinned
            (``max_pinned_share``, or the guarantees of other namespaces).
        """

    @abstractmethod
    def unpin(self, name: str) -> Pin:
        """Release a pinned prefix: its blocks may be evicted again. PinError if no pin has that name."""

    @abstractmethod
    def pins(self) -> list[Pin]:
        """The pinned prefixes."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Counts of the index, of the SSD tier and of the tasks, now; of matches, by reason, since the start."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise InvariantError if the index or the slots are not consistent."""
