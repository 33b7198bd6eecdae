"""Steps in flight, and the correctness of the KV in the engine's pages.

The engine computes a step, and reports later that some loads of the step have failed. KV that the step computed from
a page of a failed load is wrong too, as is KV that later steps in flight compute from that. The ledger tracks wrong
pages through every request whose block table contains them, and decides which saved blocks may become visible.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from flexkv.integration.vllm.tracked_request import TrackedRequest

_MAX_IN_FLIGHT = 64
"""Maximum number of steps in flight. An engine has two, or as many as pipeline stages; more means that steps are not
reported."""

LOADING, BAD = np.uint8(1), np.uint8(2)
_NOT_BAD, _NOT_LOADING = np.uint8(0xFF ^ 2), np.uint8(0xFF ^ 1)


class Trust(Enum):
    """Whether a request may use the engine's own copy of its prefix."""

    GOOD = "good"
    UNKNOWN = "unknown"
    """A page of the prefix is being loaded for a request that computes already; the result is known after that step."""
    BAD = "bad"
    """The engine caches a page of the prefix whose content is wrong."""


@dataclass(slots=True, eq=False)
class Write:
    """Tokens of one request that a step computes.

    Attributes
    ----------
    pages : (n,) int32
        The request's pages up to the last page that is written.
    first : int
        Position of the first page that is written.
    whole : int
        Position of the first page that is written from its first token on.
    """

    tracked: TrackedRequest
    pages: NDArray[np.int32]
    first: int
    whole: int


@dataclass(slots=True, eq=False)
class Put:
    """Blocks that are being saved. ``pages`` ((n,) int32): the request's pages up to the last saved block."""

    task_id: int
    pages: NDArray[np.int32]


@dataclass(slots=True, eq=False)
class SyncLoad:
    """A layerwise load into ``pages`` ((n,) int32). ``first``, ``key``: position and key of its first block."""

    pages: NDArray[np.int32]
    first: int
    key: bytes

    def may_be_of(self, keys: NDArray[np.uint64]) -> bool:
        """Whether a sequence may contain the first block of the load; not if it has another key there."""
        return len(keys) <= self.first or keys[self.first].tobytes() == self.key


@dataclass(slots=True, eq=False)
class Step:
    """A step that was scheduled and has not ended yet.

    Attributes
    ----------
    reported : bool
        Whether the engine has reported the step's invalid pages.
    invalid : set of int
        Pages that are invalid after the step.
    """

    has_forward: bool
    writes: list[Write]
    loads: list[SyncLoad]
    puts: list[Put] = field(default_factory=list)
    reported: bool = False
    invalid: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decisions at the end of a step.

    Attributes
    ----------
    accepted : list of (int, int or None)
        Task of each put of the step, and the first block that must be dropped; None: no block is dropped.
    spoiled : bool
        Whether pages have become bad, or puts are dropped.
    """

    accepted: list[tuple[int, int | None]]
    spoiled: bool


class StepLedger:
    """The steps in flight, in order, and the state of each page after the last step that has ended.

    Parameters
    ----------
    several : bool
        Whether the engine schedules a step before the previous step has ended. If a load fails in a step that computes
        its request, vLLM then mixes up the request's tokens: all pages that the request writes from then on are bad.

    Attributes
    ----------
    lost : bool
        Whether the engine schedules more steps than it ends. Then it is unknown which step has ended, and no put is
        accepted.
    """

    def __init__(self, several: bool = False) -> None:
        self.lost = False
        self._several = several
        self._mixed_up: WeakSet[TrackedRequest] = WeakSet()
        self._steps: deque[Step] = deque()
        self._state = np.zeros(1024, dtype=np.uint8)
        self._num_bad = self._num_loading = 0
        self._next_loads: list[SyncLoad] = []
        self._async_loads: dict[str, list[NDArray[np.int32]]] = {}
        self._doubted: dict[bytes, int] = {}                # bad pages that other requests may reuse, by key

    # ---- called when the scheduler acts -----------------------------------------------------------------------

    def load_started(self, req_id: str, pages: NDArray[np.int32], sync: bool, first: int, key: bytes) -> None:
        """Record a load into ``pages`` of a request; ``first``, ``key``: position and key of its first block. ``sync``:
        the request already computes in the next step."""
        self._grow(pages)
        self._state[pages] = LOADING
        if sync:
            self._next_loads.append(SyncLoad(pages, first, key))
        else:
            self._async_loads.setdefault(req_id, []).append(pages)
        self._recount()

    def begin(self, has_forward: bool, writes: list[Write]) -> list[int]:
        """Record that the next step is scheduled; returns the tasks of puts that will never be decided."""
        dropped = []
        if len(self._steps) == _MAX_IN_FLIGHT:
            self.lost = True
        if self.lost:
            dropped = self.drop_puts()
            self._steps.clear()
        for write in writes:
            self._grow(write.pages)
        self._steps.append(Step(has_forward, writes, self._next_loads))
        self._next_loads = []
        return dropped

    def add_put(self, task_id: int, pages: NDArray[np.int32]) -> None:
        """Record a put that is decided at the end of the latest step, which must be in flight. ``pages``: the request's
        pages up to the last block of the put."""
        self._steps[-1].puts.append(Put(task_id, pages))

    def drop_puts(self, task_ids: set[int] | None = None) -> list[int]:
        """Forget undecided puts of these tasks (None: of all tasks); returns the tasks that were forgotten."""
        dropped = []
        for step in self._steps:
            gone = [put.task_id for put in step.puts if task_ids is None or put.task_id in task_ids]
            dropped += gone
            step.puts = [put for put in step.puts if put.task_id not in gone]
        return dropped

    # ---- called when the engine reports -----------------------------------------------------------------------

    def report(self, invalid: Iterable[int], loaded: Iterable[str]) -> None:
        """Record the report of the oldest step: its invalid pages, and the requests whose asynchronous loads have
        ended."""
        if not self._steps:
            return
        step = self._steps[0]
        step.reported = True
        step.invalid.update(invalid)
        for req_id in loaded:
            for pages in self._async_loads.pop(req_id, ()):
                self._state[pages] &= _NOT_LOADING
        self._recount()

    def end(self) -> Verdict | None:
        """Record the end of the oldest step; returns the decisions, or None if no step is in flight."""
        if not self._steps:
            return None
        step = self._steps.popleft()
        return self._end(step, known=not self.lost and (step.reported or not step.has_forward))

    def _end(self, step: Step, known: bool) -> Verdict:
        before = self._num_bad
        if before or step.invalid or step.loads or not known:
            for load in step.loads:
                self._state[load.pages] &= _NOT_LOADING
            if self._several and step.invalid:
                self._find_mixed_up(step)
            if known:
                self._follow(step)
            else:
                self._distrust(step)
            self._recount()
            self._doubt(step.writes)
        accepted = [(put.task_id, self.first_suspect(put.pages) if known else 0) for put in step.puts]
        spoiled = bool(step.invalid or not known or self._num_bad > before)
        return Verdict(accepted, spoiled or any(stop is not None for _, stop in accepted))

    def _find_mixed_up(self, step: Step) -> None:
        """Find the requests whose outputs of this step vLLM drops, because of an invalid page, while its workers keep
        them. vLLM takes the outputs of later steps in flight: ``_follow`` is enough for the pages of those."""
        invalid = np.fromiter(step.invalid, dtype=np.int32)
        self._mixed_up.update(write.tracked for write in step.writes if np.isin(write.pages, invalid).any())

    def _mark_bad(self, pages: set[int]) -> None:
        if pages:
            array = np.fromiter(pages, dtype=np.int32, count=len(pages))
            self._grow(array)
            self._state[array] |= BAD

    def _distrust(self, step: Step) -> None:
        """Mark all pages that the step wrote or loaded: nothing is known of them."""
        self._mark_bad(step.invalid)
        for pages in (*(load.pages for load in step.loads), *(write.pages[write.first :] for write in step.writes)):
            self._state[pages] |= BAD

    def _follow(self, step: Step) -> None:
        """Mark the pages that the step wrote. A page is bad if any page before it in its request is bad."""
        for write in step.writes:
            self._state[write.pages[write.whole :]] &= _NOT_BAD
        for write in step.writes:
            if write.tracked in self._mixed_up:
                self._state[write.pages[write.first :]] |= BAD
        self._mark_bad(step.invalid)                        # reported after the step: its writes do not repair them
        changed = True
        while changed:
            changed = False
            for write in step.writes:
                bad = np.flatnonzero(self._state[write.pages] & BAD)
                if len(bad):
                    tail = write.pages[max(int(bad[0]), write.first) :]
                    if not (self._state[tail] & BAD).all():
                        self._state[tail] |= BAD
                        changed = True

    def _doubt(self, writes: list[Write]) -> None:
        for write in writes:
            keys = write.tracked.keys()
            for position in np.flatnonzero(self._state[write.pages[: len(keys)]] & BAD).tolist():
                self._doubted[keys[position].tobytes()] = int(write.pages[position])

    # ---- state of pages ---------------------------------------------------------------------------------------

    def first_suspect(self, pages: NDArray[np.int32]) -> int | None:
        """Position of the first page that is bad or being loaded; None: no page is."""
        if not self._num_bad and not self._num_loading:
            return None
        self._grow(pages)
        suspects = np.flatnonzero(self._state[pages])
        return int(suspects[0]) if len(suspects) else None

    def trust(self, keys: NDArray[np.uint64], num_blocks: int) -> Trust:
        """Trust in the first ``num_blocks`` blocks of a sequence, which are in the engine's own cache. A block without
        a key, as of a request whose keys cannot be computed, may be any block that is being loaded or bad."""
        if num_blocks:
            loads = (*self._next_loads, *(load for step in self._steps for load in step.loads))
            if any(load.first < num_blocks and load.may_be_of(keys) for load in loads):
                return Trust.UNKNOWN
        if self._num_bad and len(keys) < num_blocks:
            return Trust.BAD
        if self._doubted:
            self._doubted = {key: page for key, page in self._doubted.items() if self._state[page] & BAD}
            if any(key.tobytes() in self._doubted for key in keys[:num_blocks]):
                return Trust.BAD
        return Trust.GOOD

    def _grow(self, pages: NDArray[np.int32]) -> None:
        if len(pages) and (highest := int(pages.max())) >= len(self._state):
            state = np.zeros(2 * highest + 1, dtype=np.uint8)
            state[: len(self._state)] = self._state
            self._state = state

    def _recount(self) -> None:
        self._num_bad = int(np.count_nonzero(self._state & BAD))
        self._num_loading = int(np.count_nonzero(self._state & LOADING))
