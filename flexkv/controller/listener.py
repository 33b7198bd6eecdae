"""Listener of a controller: its socket, the ranks that have registered, and their host pool."""

from collections.abc import Callable, Sequence

from flexkv.config import TransferConfig
from flexkv.controller.registry import Registry
from flexkv.errors import TransferError
from flexkv.protocol.registration import Hello
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout
from flexkv.storage.ssd.gds_queue import GdsEnd
from flexkv.transfer.engine import AgentListener, TransferEngine
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.watch import Watch


class Listener(AgentListener):
    """Accepts connections of ranks and users, makes the host pool, and passes agents to the data plane.

    Connections are handled on the data plane's background thread.

    Parameters
    ----------
    config : TransferConfig
    transfer : TransferEngine
        Data plane that takes the agents. Its shutdown closes the listener.
    host_bytes : int
        Size of the host tier in bytes.
    num_slots : int, optional
        Slots of the host tier; default: as many as fit ``host_bytes``.
    ranks : int
        Device agents of each data-parallel client.
    dp_client_ids : tuple of int
    hugepage_bytes : int
        Size of the huge pages of the host pool; 0: ordinary pages.
    on_control : callable
        ``on_control(message, descriptors) -> reply``: executes the request of a user.
    on_gds : callable, optional
        As in ``Registry``.
    """

    def __init__(
        self,
        config: TransferConfig,
        transfer: TransferEngine,
        *,
        host_bytes: int,
        num_slots: int | None = None,
        ranks: int = 1,
        dp_client_ids: tuple[int, ...] = (0,),
        hugepage_bytes: int = 0,
        on_control: Callable[[bytes, Sequence[int]], bytes] = lambda message, fds: b"{}",
        on_gds: Callable[[GdsEnd], None] | None = None,
    ) -> None:
        self._config = config
        self._transfer = transfer
        self._host_bytes = host_bytes
        self._num_slots = num_slots
        self._ranks = ranks
        self._clients = dp_client_ids
        self._hugepage_bytes = hugepage_bytes
        self._on_control = on_control
        self._on_gds = on_gds
        self._registry: Registry | None = None
        self._pool: HostPool | None = None

    def start(self) -> None:
        """Start the data plane and listen; returns at once.

        Raises
        ------
        RegistrationError
            The socket cannot be opened.
        TransferError
            The data plane was started before.
        """
        self._transfer.start(self._open)

    def _open(self, watch: Watch, join: Callable[[AgentLink], None]) -> AgentListener:
        self._registry = Registry(
            watch, self._config.gpu_register_port, self._clients, self._ranks, self._make_pool,
            self._config.handshake_timeout_s, self._config.ring_bytes, join, self._on_control, self._on_gds,
        )
        return self

    def _make_pool(self, layout: SlotLayout) -> HostPool:
        slot_bytes = layout.slot_bytes
        num_slots = self._num_slots if self._num_slots is not None else self._host_bytes // slot_bytes
        pool = HostPool(slot_bytes, num_slots, self._hugepage_bytes, layout.content)
        self._pool = pool
        try:
            pool.populate(self._transfer.populated)
        except BaseException:
            self._pool = None
            pool.close()
            raise
        return pool

    @property
    def is_ready(self) -> bool:
        """Whether every rank is registered and has pinned the usable slots, and the host pool exists."""
        transfer, registry = self._transfer, self._registry
        return (
            registry is not None and transfer.in_service and transfer.is_running and registry.complete
            and transfer.agents_caught_up
        )

    def describe_ranks(self) -> str:
        """Number of connected ranks, in words; empty before ``start`` and after a shutdown."""
        return self._registry.describe() if self._registry is not None and self._transfer.is_running else ""

    @property
    def host_pool(self) -> HostPool:
        """The memory of the host tier. TransferError until all ranks of one data-parallel client have registered."""
        if self._pool is None:
            raise TransferError("no rank has registered yet, so there is no host pool")
        return self._pool

    # ---- called by the data plane -----------------------------------------------------------------------------

    def lost(self, hello: Hello) -> None:
        """See ``AgentListener``."""
        if self._registry is not None:
            self._registry.lost(hello)

    def close(self) -> None:
        """See ``AgentListener``."""
        if self._registry is not None:
            self._registry.close()

    def free(self) -> None:
        """See ``AgentListener``."""
        if self._pool is not None:
            self._pool.close()
