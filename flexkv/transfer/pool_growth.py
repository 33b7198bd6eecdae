"""Growth of the host pool: slots become usable when they are populated and the ranks of an engine have pinned them."""

from collections.abc import Callable, Iterable

from flexkv.transfer.executors.agent_link import AgentLink


class PoolGrowth:
    """Counts the usable slots of the host pool: the leading slots that are populated, and that all connected ranks of
    at least one engine have pinned.

    The count never decreases. Ranks of another engine, and ranks that register again, take part in transfers at once:
    until they have pinned the pool, too, they copy through the driver's own memory, which is slower. A storage host has
    a pool of its own. It takes part in transfers when that has as many usable slots (``AgentLink.caught_up``), and the
    count never exceeds theirs.

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
        self.usable = 0
        self.complete = False

    def populated(self, num_slots: int, last: bool) -> None:
        """Record that ``num_slots`` slots are populated; ``last``: the pool does not grow further. Any thread may call
        it."""
        self._populated = (num_slots, last)
        self._wake()

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
        extent = self._populated
        if extent != self._announced_extent:
            self._announced.clear()
        for link in links - self._announced:
            link.rings.note_populated(*extent)
        self._announced, self._announced_extent = links, extent
        if (self.complete and self.usable == extent[0]) or not may_grow:
            return
        pinned = {link: min(extent[0], link.rings.usable_slots) for link in links}     # a rank may report any number
        usable = max(self.usable, self._most_of_an_engine(pinned), min(self._kept, extent[0]))
        for link in links:
            link.caught_up = link.caught_up or pinned[link] >= usable
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
