"""What is to be moved: ops on lists of blocks, and which waits for which."""

import enum
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import InvariantError


class OpKind(enum.IntEnum):
    """From where to where. The numbers are those of the device agent's protocol (csrc/agent.h)."""

    D2H = 1
    H2D = 2


class OpStatus(enum.Enum):
    """How an op, or a whole graph, stands; all but the first two are final."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


class TransferOp:
    """Moves block i from ``src[i]`` to ``dst[i]``.

    Block i starts when block i of every op in ``depends_on`` has arrived, whatever their other blocks do; if one of
    them fails, it fails.

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
    depends_on : sequence of TransferOp
        Of the same length.

    Attributes
    ----------
    ok, resolved : (n,) bool
        Arrived; arrived or failed.
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
        depends_on: Sequence["TransferOp"] = (),
    ) -> None:
        if len(src) != len(dst) or len(src) == 0 or any(len(op) != len(src) for op in depends_on):
            raise ValueError(f"{len(src)} sources, {len(dst)} destinations: an op and what it waits for must match")
        self.kind = kind
        self.src = np.ascontiguousarray(src, dtype=np.int32)
        self.dst = np.ascontiguousarray(dst, dtype=np.int32)
        self.dp_client_id = dp_client_id
        self.fence = fence
        self.layerwise = layerwise
        self.counter = counter
        self.depends_on = tuple(depends_on)
        self.task_id = 0          # set by its graph
        self.status = OpStatus.PENDING
        self.ok = np.zeros(len(src), dtype=np.bool_)
        self.resolved = np.zeros(len(src), dtype=np.bool_)
        self.started = np.zeros(len(src), dtype=np.bool_)
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

    def resolve(self, indices: NDArray[np.integer] | slice, ok: NDArray[np.bool_] | bool) -> None:
        """Record results of blocks; each block has one.

        Raises
        ------
        InvariantError
            A block had its result already.
        """
        if self.resolved[indices].any():
            raise InvariantError("a block was given two results")
        self.resolved[indices] = True
        self.ok[indices] = ok
        self.num_resolved += len(self.resolved[indices])

    def startable(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Blocks not started that can start now, and blocks not started that never can."""
        ready = ~self.started
        doomed = np.zeros(len(self), dtype=np.bool_)
        for op in self.depends_on:
            ready &= op.resolved & op.ok
            doomed |= op.resolved & ~op.ok
        return np.flatnonzero(ready), np.flatnonzero(doomed & ~self.started)


class TransferGraph:
    """The ops of one task, in an order in which each comes after what it depends on.

    Attributes
    ----------
    status : OpStatus
        Final as soon as the result is known; TIMEOUT and CANCELLED can be, before ``quiesced``.
    quiesced : bool
        Nothing touches the slots or pages of any op any more.
    """

    def __init__(self, task_id: int, ops: Sequence[TransferOp]) -> None:
        self.task_id = task_id
        self.ops = tuple(ops)
        self.status = OpStatus.PENDING
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
        seen: set[TransferOp] = set()
        if not self.ops:
            raise InvariantError("a graph without ops")
        for op in self.ops:
            if any(before not in seen for before in op.depends_on):
                raise InvariantError("an op comes before what it depends on, or that is not in the graph")
            if op.num_resolved != int(op.resolved.sum()) or (op.ok & ~op.resolved).any():
                raise InvariantError("the results of an op are inconsistent")
            seen.add(op)
