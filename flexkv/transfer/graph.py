"""Transfer graphs: ops on lists of blocks, and the dependencies between them."""

import enum
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import InvariantError
from flexkv.protocol.ring import OpKind

_NONE = np.zeros(0, dtype=np.intp)
_INT32 = np.dtype(np.int32)


class OpStatus(enum.Enum):
    """State of an op or a graph; all states but PENDING and RUNNING are final."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


Route = tuple[OpKind, int]
"""Kind of an op, and the number of the lower tier that it concerns, or 0."""


class Dependency:
    """Dependency of an op on ``op``, which may be of another graph: block ``mine[i]`` waits for block ``theirs[i]``.

    Parameters
    ----------
    op : TransferOp
    mine : (k,) intp
        Blocks of the dependent op; each block at most once.
    theirs : (k,) intp
        Blocks of ``op``.
    """

    __slots__ = ("_order", "mine", "op", "theirs")

    def __init__(self, op: "TransferOp", mine: NDArray[np.intp], theirs: NDArray[np.intp]) -> None:
        if len(mine) != len(theirs):
            raise ValueError(f"{len(mine)} blocks depend on {len(theirs)} blocks: the numbers must be equal")
        self.op = op
        self.mine = np.ascontiguousarray(mine, dtype=np.intp)
        self.theirs = np.ascontiguousarray(theirs, dtype=np.intp)
        self._order: NDArray[np.intp] | None = None

    def waiting_for(self, indices: NDArray[np.intp]) -> NDArray[np.intp]:
        """Indices of the pairs that wait for blocks ``indices`` of ``op``, in time linear in the number of these pairs
        (times a logarithm for each block)."""
        if self._order is None:
            self._order = np.argsort(self.theirs, kind="stable")
        first = np.searchsorted(self.theirs, indices, side="left", sorter=self._order)
        count = np.searchsorted(self.theirs, indices, side="right", sorter=self._order) - first
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        pairs: NDArray[np.intp] = self._order[np.repeat(first, count) + nth]
        return pairs

    @classmethod
    def each(cls, op: "TransferOp") -> "Dependency":
        """Dependency of every block on the block of ``op`` with the same index."""
        every = np.arange(len(op))
        return cls(op, every, every)


def _number(name: str, value: int, bits: int) -> int:
    """Convert ``value`` to int; ValueError unless it is an integer in ``[0, 2**bits)``."""
    if type(value) is int and 0 <= value < 1 << bits:
        return value
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} is {value!r}: it must be an integer from 0 to 2**{bits} - 1")
    return number


def _int32(name: str, values: NDArray[np.int32]) -> NDArray[np.int32]:
    """Convert slots or pages to the agents' format, contiguous int32; ValueError if a number does not fit."""
    array = np.ascontiguousarray(values)
    if array.dtype != _INT32:
        bounds = np.iinfo(np.int32)
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < bounds.min or array.max() > bounds.max:
            raise ValueError(f"{name} is {array.dtype} {array.shape}: it must have one dimension of 32-bit integers")
        array = array.astype(np.int32)
    return array


def _further(pages: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Convert the pages of ``count`` blocks in further layer groups to contiguous int32; ValueError if they are not."""
    table = np.asarray(pages)
    if table.ndim != 2 or table.shape[1] != count or table.size == 0:
        raise ValueError(f"further_pages is {table.shape}: it must have a row for each group and {count} columns")
    return _int32("further_pages", table.ravel()).reshape(table.shape)


@dataclass(frozen=True)
class PartOf:
    """The op of another node's controller of which an op is a part, as the ranks must know it.

    Attributes
    ----------
    task_id, num_blocks : int
        Task and number of blocks of that op.
    has_more : bool
        Further parts follow.
    """

    task_id: int
    num_blocks: int
    has_more: bool


class TransferOp:
    """Moves block i from ``src[i]`` to ``dst[i]``.

    A block starts when all blocks that it depends on have arrived, independently of other blocks of its op. It fails if
    one of its dependencies fails.

    Parameters
    ----------
    kind : OpKind
    src, dst : (n,) int32
        Slots or pages, depending on ``kind``. A block whose slot or page does not exist fails.
    dp_client_id : int
        Data-parallel client whose ranks move the blocks.
    fence : int
        Step of the ranks that must be done before the pages are accessed; 0: none.
    layerwise : bool
        Load layer by layer, so that compute of the first layers overlaps the load.
    counter : int
        Counter, from 1, whose eventfds signal the layers of a layerwise load; 0: none.
    depends_on : sequence of Dependency
    after : sequence of TransferOp
        Ops of other graphs that must succeed as a whole before any block starts. If one fails, every block fails.
    keys, parents : (n, 2) uint64, optional
        Keys of the blocks and of their parents, which a persistent tier records.
    tier : int
        Number of the lower tier that the op reads or writes; 0: none.
    further_pages : (num_groups - 1, n) int32, optional
        Pages in the layer groups after the first, whose pages are in ``src`` or ``dst``. -1: the block has no page in
        the group, and its bytes of the group are not moved. A block without a page in any group fails.
    checksums : (n,) uint64, optional
        Expected checksums of the blocks of a read from a lower tier. A block with another checksum fails.
    part_of : PartOf, optional
    exchange : int
        Number of the exchange of which the op is the first step (H2D: each rank reads its shares) or the second (P2D);
        0: none.

    Attributes
    ----------
    ok, resolved : (n,) bool
        Blocks that have arrived; blocks that have arrived or failed.
    missing : (n,) int32
        Number of dependencies of each block that have not arrived, set by ``begin``.
    dependents : list of (TransferOp, Dependency)
        Running ops that depend on this op, with their dependency; kept by the engine.
    followers : list of TransferOp
        Running ops that have this op in ``after``.
    unmet : int
        Ops of ``after`` that have not ended.
    is_refused : bool
        An op of ``after`` did not succeed.
    is_lost : bool
        A process that moved blocks of the op has ended meanwhile, or was disconnected.
    """

    def __init__(
        self,
        kind: OpKind,
        src: NDArray[np.int32],
        dst: NDArray[np.int32],
        dp_client_id: int = 0,
        fence: int = 0,
        layerwise: bool = False,
        counter: int = 0,
        depends_on: Sequence[Dependency] = (),
        after: Sequence["TransferOp"] = (),
        keys: NDArray[np.uint64] | None = None,
        parents: NDArray[np.uint64] | None = None,
        tier: int = 0,
        further_pages: NDArray[np.int32] | None = None,
        checksums: NDArray[np.uint64] | None = None,
        part_of: PartOf | None = None,
        exchange: int = 0,
    ) -> None:
        if len(src) != len(dst) or len(src) == 0:
            raise ValueError(f"{len(src)} sources, {len(dst)} destinations: the numbers must be equal, and at least 1")
        self.kind = kind
        self.tier = tier
        self.src, self.dst = _int32("src", src), _int32("dst", dst)
        self.dp_client_id = _number("dp_client_id", dp_client_id, 31)
        self.fence = _number("fence", fence, 63)
        self.layerwise = layerwise
        self.counter = _number("counter", counter, 31)
        self.depends_on = tuple(depends_on)
        self.after = tuple(after)
        self.keys = keys
        self.parents = parents
        self.further_pages = None if further_pages is None else _further(further_pages, len(src))
        self.checksums = checksums
        self.part_of = part_of
        self.exchange = exchange
        self.dependents: list[tuple[TransferOp, Dependency]] = []
        self.followers: list[TransferOp] = []
        self.unmet = 0
        self.is_refused = self.is_lost = False
        self.task_id = 0          # set by its graph
        self.status = OpStatus.PENDING
        self.ok = np.zeros(len(src), dtype=np.bool_)
        self.resolved = np.zeros(len(src), dtype=np.bool_)
        self.started = np.zeros(len(src), dtype=np.bool_)
        self.missing = np.zeros(len(src), dtype=np.int32)
        self.num_resolved = 0

    def __len__(self) -> int:
        return len(self.src)

    @property
    def route(self) -> Route:
        """Kind and tier of the op, which determine its executor."""
        return self.kind, self.tier

    @property
    def done(self) -> bool:
        """Whether every block has a result."""
        return self.num_resolved == len(self)

    @property
    def waiting(self) -> NDArray[np.intp]:
        """(k,) intp: blocks that have not started, ascending."""
        return (~self.started).nonzero()[0]

    def resolve(self, indices: NDArray[np.integer] | slice, ok: NDArray[np.bool_] | bool) -> None:
        """Record the results of blocks. Each block has exactly one result.

        Raises
        ------
        InvariantError
            A block already has a result.
        """
        resolved = self.resolved[indices]
        if np.count_nonzero(resolved):
            raise InvariantError("a block was given two results")
        self.resolved[indices] = True
        self.ok[indices] = ok
        self.num_resolved += len(resolved)

    def begin(self) -> None:
        """Register with the ops that this op depends on, so that ``on_progress`` and ``ended`` are called."""
        for dependency in self.depends_on:
            self.missing[dependency.mine] += ~dependency.op.ok[dependency.theirs]
            if not dependency.op.done:
                dependency.op.dependents.append((self, dependency))
        for op in self.after:
            if not op.done:
                self.unmet += 1
                op.followers.append(self)
            elif op.status is not OpStatus.DONE:
                self.is_refused = True

    def ended(self, op: "TransferOp") -> None:
        """Record the end of an op of ``after``. ``startable`` may change."""
        self.unmet -= 1
        self.is_refused |= op.status is not OpStatus.DONE

    def startable(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Blocks that can start now, and blocks that can never start, each (k,) intp. Neither have started before."""
        if self.is_refused:
            return _NONE, self.waiting
        if not self.depends_on:
            return _NONE if self.unmet else self.waiting, _NONE
        failed = np.zeros(len(self), dtype=np.bool_)
        for dependency in self.depends_on:
            arrived, ended = dependency.op.ok[dependency.theirs], dependency.op.resolved[dependency.theirs]
            failed[dependency.mine] |= ended & ~arrived
        able = _NONE if self.unmet else np.flatnonzero((self.missing == 0) & ~self.started)
        return able, np.flatnonzero(failed & ~self.started)

    def on_progress(
        self, dependency: Dependency, indices: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Record new results of the blocks ``indices`` of ``dependency.op``; returns ``startable`` for their
        dependents."""
        pairs = dependency.waiting_for(indices)
        mine, arrived = dependency.mine[pairs], dependency.op.ok[dependency.theirs[pairs]]
        self.missing[mine] -= arrived
        new = ~self.started[mine]
        able = _NONE if self.unmet else mine[new & (self.missing[mine] == 0)]
        return able, mine[new & ~arrived]


class TransferGraph:
    """The ops of one task. Each op must come after the ops of the graph that it depends on.

    Attributes
    ----------
    status : OpStatus
        Final as soon as the result is known. A stopped graph has its final status before ``quiesced``.
    verdict : OpStatus or None
        Result of a stopped graph, independent of the results of its blocks; None if it was not stopped. If it is set
        before the graph is submitted, no block starts.
    reason : str
        Reason of the stop, for a user; empty if it needs no explanation.
    quiesced : bool
        Slots and pages of the graph's ops are not accessed any more.
    on_stop : callable or None
        ``on_stop(graph)`` is called when a running graph is stopped, before it is quiesced.
    """

    def __init__(self, task_id: int, ops: Sequence[TransferOp]) -> None:
        self.task_id = task_id
        self.ops = tuple(ops)
        self.status = OpStatus.PENDING
        self.verdict: OpStatus | None = None
        self.reason = ""
        self.quiesced = False
        self.on_stop: Callable[[TransferGraph], None] | None = None
        for op in self.ops:
            op.task_id = task_id
        self.check_integrity()

    @property
    def done(self) -> bool:
        """Whether the result is known."""
        return self.status not in (OpStatus.PENDING, OpStatus.RUNNING)

    def check_integrity(self) -> None:
        """Raise InvariantError if the graph has no ops, or an op is out of order or has wrong counts."""
        later = set(self.ops)
        if not self.ops:
            raise InvariantError("a graph without ops")
        for op in self.ops:
            if any(needed.op in later for needed in op.depends_on):
                raise InvariantError("an op comes before its dependency")
            if op.num_resolved != np.count_nonzero(op.resolved) or np.count_nonzero(op.ok > op.resolved):
                raise InvariantError("the results of an op are inconsistent")
            later.remove(op)
