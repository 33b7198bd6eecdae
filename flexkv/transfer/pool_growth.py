"""Growth of the host pool: a slot is usable when the controller has populated it and every rank has pinned it."""

import time
from collections.abc import Callable, Iterable

from flexkv.transfer.executors.agent_link import AgentLink

_STANDS_S = 5.0
"""Time without progress after which the ranks of an engine do not hold up the pool of other engines any more, in
seconds. A part is pinned in 10 to 100 ms, so they are stopped, or their driver hangs."""


class PoolGrowth:
    """Counts the usable slots of the host pool: the leading slots that are populated and pinned by every rank.

    The count never decreases. A rank that registers later, because its process was restarted, has no pinned slots at
    first. Until it has pinned the usable slots (``AgentLink.caught_up``), it takes part in no transfer and the engine
    is not ready. So a match never returns a slot that a rank cannot copy from yet. If the ranks of one of several
    engines pin nothing for ``_STANDS_S`` seconds, the pool grows without them; they are then like ranks that register
    later.

    Parameters
    ----------
    on_capacity : callable
        ``on_capacity(num_slots)``, called by ``update`` each time that more slots become usable.
    wake : callable
        Called when ``update`` must be called, on the thread that populates the pool.
    on_change : callable
        Called by ``update`` when ``usable`` or ``complete`` has changed.
    clock : callable
        Monotonic time in seconds.

    Attributes
    ----------
    usable : int
        Number of usable slots, counted from the first slot.
    complete : bool
        Whether every connected rank has pinned the usable slots.
    """

    def __init__(
        self, on_capacity: Callable[[int], None], wake: Callable[[], None], on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._progress: dict[int, tuple[int, float]] = {}    # by engine: slots that its ranks have pinned, since when
        self._on_capacity = on_capacity
        self._wake = wake
        self._on_change = on_change
        self._populated = (0, False)         # replaced as a whole, by the thread that populates
        self._announced: set[AgentLink] = set()
        self._announced_extent = self._populated
        self.usable = 0
        self.complete = False

    def populated(self, num_slots: int, last: bool) -> None:
        """Record that ``num_slots`` slots are populated; ``last``: the pool does not grow further. Any thread may call
        it."""
        self._populated = (num_slots, last)
        self._wake()

    def joined(self) -> None:
        """Record that a rank has registered; it has no pinned slots yet."""
        self.complete = False

    def update(self, links: Iterable[AgentLink], may_grow: bool = True) -> None:
        """Announce the populated slots to the ranks, and read the number that each has pinned. Must be called by the
        data plane's thread. ``may_grow``: whether more slots may become usable."""
        links = set(links)
        extent = self._populated
        if extent != self._announced_extent:
            self._announced.clear()
        for link in links - self._announced:
            link.rings.note_populated(*extent)
        self._announced, self._announced_extent = links, extent
        if (self.complete and self.usable == extent[0]) or not may_grow:
            return
        pinned = {link: min(extent[0], link.rings.usable_slots) for link in links}     # a rank may report any number
        for link in links:
            link.caught_up = link.caught_up or pinned[link] >= self.usable
        usable = self._next_usable(pinned)
        for link in links:
            if pinned[link] < usable:                # it pins nothing more
                link.caught_up = False
        complete = all(link.caught_up for link in links)
        changed = complete != self.complete or usable > self.usable
        self.complete = complete
        if usable > self.usable:
            self.usable = usable
            self._on_capacity(usable)
        if changed:
            self._on_change()

    def _next_usable(self, pinned: dict[AgentLink, int]) -> int:
        """Slots that every rank has pinned, except the ranks of engines that pin nothing more."""
        now, shares = self._clock(), dict[int, int]()
        for link, count in pinned.items():
            client = link.hello.dp_client_id
            shares[client] = min(count, shares.get(client, count))
        known = self._progress
        self._progress = {
            client: known[client] if client in known and known[client][0] == count else (count, now)
            for client, count in shares.items()
        }
        most = max(shares.values(), default=0)
        return min((
            count for client, count in shares.items() if count == most or now - self._progress[client][1] < _STANDS_S
        ), default=0)
