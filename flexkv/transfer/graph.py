"""Transfer graphs: ops on lists of blocks, and the order between them."""

import enum
import operator
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import InvariantError
from flexkv.protocol.ring import OpKind

_NONE = np.zeros(0, dtype=np.intp)
_INT32 = np.dtype(np.int32)


class OpStatus(enum.Enum):
    """How an op, or a whole graph, stands; all but the first two are final."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


class Dependency:
    """Block ``mine[i]`` of the op that has it waits for block ``theirs[i]`` of ``op``, which may be of another graph.

    Parameters
    ----------
    op : TransferOp
    mine : (k,) intp
        No block twice.
    theirs : (k,) intp
    """

    __slots__ = ("_order", "mine", "op", "theirs")

    def __init__(self, op: "TransferOp", mine: NDArray[np.intp], theirs: NDArray[np.intp]) -> None:
        if len(mine) != len(theirs):
            raise ValueError(f"{len(mine)} blocks depend on {len(theirs)}: they must match")
        self.op = op
        self.mine = np.ascontiguousarray(mine, dtype=np.intp)
        self.theirs = np.ascontiguousarray(theirs, dtype=np.intp)
        self._order: NDArray[np.intp] | None = None

    def waiting_for(self, indices: NDArray[np.intp]) -> NDArray[np.intp]:
        """Which of the pairs wait for blocks ``indices`` of ``op``; takes as long as there are such blocks."""
        if self._order is None:
            self._order = np.argsort(self.theirs, kind="stable")
        first = np.searchsorted(self.theirs, indices, side="left", sorter=self._order)
        count = np.searchsorted(self.theirs, indices, side="right", sorter=self._order) - first
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        pairs: NDArray[np.intp] = self._order[np.repeat(first, count) + nth]
        return pairs

    @classmethod
    def each(cls, op: "TransferOp") -> "Dependency":
        """Every block waits for the one at its own place."""
        every = np.arange(len(op))
        return cls(op, every, every)


def _number(name: str, value: int, bits: int) -> int:
    """``value`` as an int; ValueError unless it is a whole number of at most so many bits."""
    if type(value) is int and 0 <= value < 1 << bits:
        return value
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} is {value!r}: must be a whole number from 0 to 2**{bits} - 1")
    return number


def _int32(name: str, values: NDArray[np.int32]) -> NDArray[np.int32]:
    """Slots or pages as the agents need them; ValueError if a number would change."""
    array = np.ascontiguousarray(values)
    if array.dtype != _INT32:
        bounds = np.iinfo(np.int32)
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < bounds.min or array.max() > bounds.max:
            raise ValueError(f"{name} is {array.dtype} {array.shape}: must be a row of 32-bit whole numbers")
        array = array.astype(np.int32)
    return array


class TransferOp:
    """Moves block i from ``src[i]`` to ``dst[i]``.

    A block starts when all blocks that it depends on have arrived, whatever other blocks do; if one of those fails, it
    fails.

    Parameters
    ----------
    kind : OpKind
    src, dst : (n,) int32
        Slots or pages, by ``kind``. A slot or page that does not exist fails its block.
    dp_client_id : int
        Whose ranks move it.
    fence : int
        Step of the ranks before which pages must not be touched; 0: none.
    layerwise : bool
        A load that goes layer by layer, so that compute of the first overlaps it.
    counter : int
        Of a layerwise load: whose eventfds tell of its layers, from 1; 0: none.
    depends_on : sequence of Dependency
    after : sequence of TransferOp
        Ops of other graphs that must succeed as a whole before any block starts; if one does not, every block fails.
    keys, parents : (n, 2) uint64, optional
        Names under which a tier that outlives the process records what it is given.

    Attributes
    ----------
    ok, resolved : (n,) bool
        Arrived; arrived or failed.
    missing : (n,) int32
        How many blocks that it depends on have not arrived, once the op was begun.
    dependents : list of (TransferOp, Dependency)
        Running ops that wait for this one, and how; kept by the engine.
    followers : list of TransferOp
        Running ops that have this one in ``after``.
    unmet : int
        Ops of ``after`` that have not ended.
    is_refused : bool
        An op of ``after`` did not succeed.
    is_lost : bool
        A process that moved blocks of it ended meanwhile, or was cut off.
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
    ) -> None:
        if len(src) != len(dst) or len(src) == 0:
            raise ValueError(f"{len(src)} sources, {len(dst)} destinations: they must match, and not be none")
        self.kind = kind
        self.src, self.dst = _int32("src", src), _int32("dst", dst)
        self.dp_client_id = _number("dp_client_id", dp_client_id, 31)
        self.fence = _number("fence", fence, 63)
        self.layerwise = layerwise
        self.counter = _number("counter", counter, 31)
        self.depends_on = tuple(depends_on)
        self.after = tuple(after)
        self.keys = keys
        self.parents = parents
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
        self.callbacks: list[Callable[[TransferOp], None]] = []

    def __len__(self) -> int:
        return len(self.src)

    def add_callback(self, callback: Callable[["TransferOp"], None]) -> None:
        """Call ``callback(op)`` once, when the op has ended and nothing touches its slots or pages any more."""
        self.callbacks.append(callback)

    @property
    def done(self) -> bool:
        """Every block has a result."""
        return self.num_resolved == len(self)

    @property
    def waiting(self) -> NDArray[np.intp]:
        """(k,) intp: blocks that have not started, ascending."""
        return (~self.started).nonzero()[0]

    def resolve(self, indices: NDArray[np.integer] | slice, ok: NDArray[np.bool_] | bool) -> None:
        """Record results of blocks; each block has one.

        Raises
        ------
        InvariantError
            A block had its result already.
        """
        resolved = self.resolved[indices]
        if np.count_nonzero(resolved):
            raise InvariantError("a block was given two results")
        self.resolved[indices] = True
        self.ok[indices] = ok
        self.num_resolved += len(resolved)

    def begin(self) -> None:
        """Register with the ops that this one waits for: see ``heard`` and ``ended``."""
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
        """An op of ``after`` has ended: ``startable`` may have changed."""
        self.unmet -= 1
        self.is_refused |= op.status is not OpStatus.DONE

    def startable(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Blocks not started that can start now, and blocks not started that never can."""
        if self.is_refused:
            return _NONE, self.waiting
        if not self.depends_on:
            return _NONE if self.unmet else self.waiting, _NONE
        doomed = np.zeros(len(self), dtype=np.bool_)
        for dependency in self.depends_on:
            arrived, ended = dependency.op.ok[dependency.theirs], dependency.op.resolved[dependency.theirs]
            doomed[dependency.mine] |= ended & ~arrived
        able = _NONE if self.unmet else np.flatnonzero((self.missing == 0) & ~self.started)
        return able, np.flatnonzero(doomed & ~self.started)

    def heard(
        self, dependency: Dependency, indices: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Blocks ``indices`` of ``dependency.op`` have their result now: ``startable`` of those that wait for them."""
        pairs = dependency.waiting_for(indices)
        mine, arrived = dependency.mine[pairs], dependency.op.ok[dependency.theirs[pairs]]
        self.missing[mine] -= arrived
        new = ~self.started[mine]
        able = _NONE if self.unmet else mine[new & (self.missing[mine] == 0)]
        return able, mine[new & ~arrived]


class TransferGraph:
    """The ops of one task, in an order in which each comes after those of them that it depends on.

    Attributes
    ----------
    status : OpStatus
        Final as soon as the result is known; TIMEOUT and CANCELLED can be, before ``quiesced``.
    verdict : OpStatus or None
        The graph was stopped, and this is its result, whatever its blocks did. Set before the graph is submitted, it
        keeps every block from starting.
    reason : str
        Why it was stopped, in words for a user; empty where that needs none.
    quiesced : bool
        Nothing touches the slots or pages of any op any more.
    """

    def __init__(self, task_id: int, ops: Sequence[TransferOp]) -> None:
        self.task_id = task_id
        self.ops = tuple(ops)
        self.status = OpStatus.PENDING
        self.verdict: OpStatus | None = None
        self.reason = ""
        self.quiesced = False
        for op in self.ops:
            op.task_id = task_id
        self.check_integrity()

    @property
    def done(self) -> bool:
        """The result is known."""
        return self.status not in (OpStatus.PENDING, OpStatus.RUNNING)

    def check_integrity(self) -> None:
        """Raise InvariantError if an op is missing, out of order, or its counts are wrong."""
        later = set(self.ops)
        if not self.ops:
            raise InvariantError("a graph without ops")
        for op in self.ops:
            if any(needed.op in later for needed in op.depends_on):
                raise InvariantError("an op comes before what it depends on")
            if op.num_resolved != np.count_nonzero(op.resolved) or np.count_nonzero(op.ok > op.resolved):
                raise InvariantError("the results of an op are inconsistent")
            later.remove(op)
