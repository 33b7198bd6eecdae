"""Growth of the host pool: slots become usable when they are populated and the ranks of an engine have pinned them.
Shrinking: memory can be given back when no rank has it pinned."""

import sys
import threading
from collections.abc import Callable, Iterable

from flexkv.transfer.executors.agent_link import AgentLink


class PoolGrowth:
    """Counts the usable slots of the host pool: the leading slots that are populated, and that all connected ranks of
    at least one engine have pinned.

    The count decreases only by ``limit``. Ranks of another engine, and ranks that register again, take part in
    transfers at once: until they have pinned the pool, too, they copy through the driver's own memory, which is slower.
    A storage host has a pool of its own. It takes part in transfers when that has as many usable slots
    (``AgentLink.caught_up``), and the count never exceeds theirs.

    A pool shrinks in these steps:

    1. ``limit``: slots beyond a number are not usable any more. The caller then waits until no transfer concerns them.
    2. ``lower``: the ranks unpin the memory of these slots, and confirm that.
    3. ``is_lowered``: every rank that may have pinned the memory has confirmed, or is at rest. The memory can be freed.

    ``raise_limit`` permits growth again, also after step 1.

    Parameters
    ----------
    on_capacity : callable
        ``on_capacity(num_slots)``, called by ``update`` each time that more slots become usable.
    wake : callable
        Called when ``update`` must be called, on the thread that populates the pool.
    on_change : callable
        Called by ``update`` when ``usable`` or ``complete`` has changed.

    Attributes
    ----------
    usable : int
        Number of usable slots, counted from the first slot.
    complete : bool
        Whether every connected rank and storage host can copy from and to the usable slots.
    """

    def __init__(
        self, on_capacity: Callable[[int], None], wake: Callable[[], None], on_change: Callable[[], None]
    ) -> None:
        self._on_capacity = on_capacity
        self._wake = wake
        self._on_change = on_change
        self._populated = (0, False)         # replaced as a whole, by the thread that populates
        self._announced: set[AgentLink] = set()
        self._announced_extent = self._populated
        self._kept = 0
        self._lock = threading.Lock()        # for ``usable``, and calls of ``on_capacity``
        self._limit = sys.maxsize
        self._lowerings = 0                  # plus 1; 0: the pool never shrinks
        self._announced_lowerings = 0
        self._told: set[AgentLink] = set()   # agents that may have pinned memory
        self._unconfirmed: set[AgentLink] = set()
        self.usable = 0
        self.complete = False

    def populated(self, num_slots: int, last: bool) -> None:
        """Record that ``num_slots`` slots are populated; ``last``: the pool does not grow further. Any thread may call
        it."""
        self._populated = (num_slots, last)
        self._wake()

    def limit(self, num_slots: int) -> None:
        """Make slots from ``num_slots`` on unusable. Any thread may call it."""
        with self._lock:
            self._limit = num_slots
            self.usable = min(self.usable, num_slots)

    def raise_limit(self) -> None:
        """Permit the pool to grow again, after ``limit`` or when ``is_lowered``. Any thread may call it."""
        with self._lock:
            self._limit = sys.maxsize
        self._wake()

    def may_lower(self) -> None:
        """Record that the pool may shrink. Must be called before a rank has registered."""
        self._lowerings = 1

    @property
    def may_shrink(self) -> bool:
        """Whether ``may_lower`` was called."""
        return self._lowerings > 0

    def lower(self, num_slots: int) -> None:
        """Ask the ranks to unpin the memory of slots from ``num_slots`` on, which ``limit`` has made unusable. Must not
        be called while another request is not ``is_lowered``. Any thread may call it."""
        self._populated = (num_slots, False)
        self._lowerings += 1
        self._wake()

    @property
    def is_lowered(self) -> bool:
        """Whether no rank has memory pinned beyond the slots of the last ``lower``."""
        return self._announced_lowerings == self._lowerings and not self._unconfirmed

    @property
    def has_ranks(self) -> bool:
        """Whether ranks were connected at the last ``update``, which may pin more."""
        return bool(self._announced)

    @property
    def num_pinning(self) -> int:
        """Number of agents that may have memory of the pool pinned, connected or not."""
        return len(self._told)

    def keep(self, num_slots: int) -> None:
        """Record that ``num_slots`` slots were usable when the pool served another data plane; they are usable now."""
        self._kept = num_slots

    def joined(self) -> None:
        """Record that a rank has registered, or a storage host has joined."""
        self.complete = False

    def update(self, links: Iterable[AgentLink], may_grow: bool = True) -> None:
        """Announce the populated slots to the ranks, and read the number that each has pinned. Must be called by the
        data plane's thread. ``may_grow``: whether more slots may become usable."""
        links = set(links)
        lowerings = self._lowerings                  # read before the number of slots, which is written first
        extent = self._populated
        self._announce(links, extent, lowerings)
        self._unconfirmed = {
            link for link in self._unconfirmed if not link.is_at_rest and link.rings.followed < lowerings
        }
        with self._lock:
            self._update_usable(links, min(extent[0], self._limit), may_grow)

    def _announce(self, links: set[AgentLink], extent: tuple[int, bool], lowerings: int) -> None:
        self._told = {link for link in self._told if not link.is_at_rest}
        if lowerings > self._announced_lowerings > 0:
            self._unconfirmed = set(self._told)      # an agent that comes later has nothing pinned beyond
        if extent != self._announced_extent or lowerings != self._announced_lowerings:
            self._announced.clear()
        for link in links - self._announced:
            link.rings.note_populated(*extent)
            if lowerings:
                link.rings.note_lowered(lowerings)
        self._told |= links
        self._announced, self._announced_extent, self._announced_lowerings = links, extent, lowerings

    def _update_usable(self, links: set[AgentLink], num_slots: int, may_grow: bool) -> None:
        if (self.complete and self.usable == num_slots) or not may_grow:
            return
        pinned = {link: min(num_slots, link.rings.usable_slots) for link in links}     # a rank may report any number
        usable = max(self.usable, self._most_of_an_engine(pinned), min(self._kept, num_slots))
        for link in links:
            is_able = link.rings.takes_part and (pinned[link] >= usable or not link.needs_slots)
            link.caught_up = link.caught_up or is_able
        complete = all(link.caught_up for link in links)
        changed = complete != self.complete or usable > self.usable
        self.complete = complete
        if usable > self.usable:
            self.usable = usable
            self._on_capacity(usable)
        if changed:
            self._on_change()

    @staticmethod
    def _most_of_an_engine(pinned: dict[AgentLink, int]) -> int:
        """Slots that all ranks of an engine have pinned, of the engine that has the most."""
        of_engines = dict[int, int]()
        for link, count in pinned.items():
            client = link.hello.dp_client_id
            of_engines[client] = min(count, of_engines.get(client, count))
        return max(of_engines.values(), default=0)
