"""Listener of a controller: the sockets of its engines, the ranks that have registered, and their host pool."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flexkv.config import TransferConfig
from flexkv.controller.host_memory import HostMemory
from flexkv.controller.nodes import NodeListener
from flexkv.controller.registry import Registry
from flexkv.errors import OtherLayoutError, TransferError
from flexkv.protocol.nodes import Terms
from flexkv.protocol.registration import Hello
from flexkv.protocol.sockets import ListeningSocket, socket_path
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout
from flexkv.storage.ssd.gds_queue import GdsEnd
from flexkv.transfer.engine import AgentListener, TransferEngine
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.watch import Watch


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one engine, before they have registered.

    Attributes
    ----------
    client : int
        Number of the engine in its controller.
    num_ranks : int
    dp_client_id : int
        The engine's data-parallel rank, as its ranks name it.
    first_task : int
        The engine's task ids are larger.
    num_nodes : int
        Nodes of the engine, with ``num_ranks`` ranks each. Those besides this one connect to ``master_host``.
    on_other_layout : callable
        Called when the ranks have registered, if the host pool is of another layout.
    on_control : callable
        ``on_control(message, descriptors) -> reply`` to the request of a user.
    """

    client: int
    num_ranks: int
    dp_client_id: int = 0
    first_task: int = 0
    num_nodes: int = 1
    on_other_layout: Callable[[], None] = lambda: None
    on_control: Callable[[bytes, Sequence[int]], bytes] = lambda message, fds: b"{}"


class Listener(AgentListener):
    """Accepts connections of ranks and users, makes the host pool, and passes agents to the data plane.

    Connections are handled on the data plane's background thread.

    Parameters
    ----------
    config : TransferConfig
    transfer : TransferEngine
        Data plane that takes the agents. Its shutdown closes the listener.
    memory : HostMemory
    keeps_memory : bool
        ``free`` leaves the memory to the caller.
    on_gds : callable, optional
        As in ``Registry``.
    on_new_content : callable
        As in ``NodeListener``.
    """

    def __init__(
        self,
        config: TransferConfig,
        transfer: TransferEngine,
        memory: HostMemory,
        *,
        keeps_memory: bool = False,
        on_gds: Callable[[GdsEnd], None] | None = None,
        on_new_content: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._transfer = transfer
        self._memory, self._keeps_memory = memory, keeps_memory
        self._on_gds = on_gds
        self._on_new_content = on_new_content
        self._plane: tuple[Watch, Callable[[AgentLink], None]] | None = None
        self._registries: dict[int, Registry] = {}
        self._nodes: dict[int, NodeListener] = {}

    def start(self, group: RankGroup | None = None, port: str = "") -> None:
        """Start the data plane, and listen for the ranks of ``group`` at ``port``; returns at once.

        Raises
        ------
        RegistrationError
            The socket cannot be opened.
        TransferError
            The data plane was started before.
        """
        self._transfer.start(partial(self._open, group, port))

    def _open(
        self, group: RankGroup | None, port: str, watch: Watch, join: Callable[[AgentLink], None]
    ) -> AgentListener:
        self._plane = watch, join
        if group is not None:
            self.add(group, ListeningSocket(socket_path(port)))
        return self

    @property
    def watch(self) -> Watch:
        """Descriptors and timers of the background thread; TransferError if that does not run."""
        if self._plane is None:
            raise TransferError("the data plane does not run")
        return self._plane[0]

    def add(self, group: RankGroup, listening: ListeningSocket) -> None:
        """Accept the ranks of an engine. On the background thread, or while that does not run. The socket is the
        listener's from here on."""
        if self._plane is None:
            listening.close()
            raise TransferError("the data plane does not run")
        watch, join = self._plane
        self._transfer.expect_ranks(group.client, group.num_ranks, group.num_nodes)
        if group.num_nodes > 1:
            try:
                terms = Terms(group.num_ranks, group.dp_client_id, secrets.token_hex(8), group.first_task)
                self._nodes[group.client] = NodeListener(
                    watch, self._config, group.client, terms, group.num_nodes - 1, join, self._on_new_content,
                    partial(self._rank_ids, group.client), lambda: self._transfer.usable_slots,
                )
            except BaseException:
                listening.close()
                raise
        self._registries[group.client] = Registry(
            watch, listening, group.client, group.dp_client_id, group.num_ranks,
            partial(self._make_pool, group),
            self._config.handshake_timeout_s, self._config.ring_bytes, join, group.on_control, self._on_gds,
            group.first_task, self._writer(group.client), self._config.exchange_copies and group.num_nodes == 1,
        )

    def _rank_ids(self, client: int) -> list[tuple[int, int]]:
        registry = self._registries.get(client)
        return registry.rank_ids if registry is not None else []

    def _writer(self, client: int) -> int | None:
        """``writer`` of an engine's ``SlotLayout``."""
        return {"rank0_only": 0, "rank_rotate": client}.get(self._config.kv_shared_across_ranks_mode)

    def remove(self, client: int, reason: str) -> None:
        """Disconnect the ranks of an engine, and accept no more of them. On the background thread."""
        registry = self._registries.pop(client, None)
        nodes = self._nodes.pop(client, None)
        if registry is not None:
            registry.close()
        if nodes is not None:
            nodes.close()
        self._transfer.dismiss_ranks(client, reason)

    def _make_pool(self, group: RankGroup, layout: SlotLayout) -> HostPool:
        before = self._memory.pool
        try:
            pool = self._memory.pool_for(layout, self._transfer.populated)
        except OtherLayoutError:
            group.on_other_layout()
            raise
        if self._keeps_memory and pool is before:
            self._transfer.keep_slots(pool.num_slots)
        return pool

    def is_ready(self, client: int) -> bool:
        """Whether every rank of an engine is registered, and slots are usable."""
        transfer, registry = self._transfer, self._registries.get(client)
        return (
            registry is not None and transfer.in_service and transfer.is_running and registry.complete
            and transfer.usable_slots > 0 and transfer.has_ranks(client)
        )

    def describe_ranks(self, client: int) -> str:
        """Number of an engine's connected ranks, in words; empty before ``start`` and after a shutdown."""
        registry, nodes = self._registries.get(client), self._nodes.get(client)
        if registry is None or not self._transfer.is_running:
            return ""
        return registry.describe() if nodes is None else f"{registry.describe()}, and {nodes.describe()}"

    @property
    def host_pool(self) -> HostPool:
        """The memory of the host tier; it exists when the ranks of one engine have registered."""
        if self._memory.pool is None:
            raise TransferError("no rank has registered yet, so there is no host pool")
        return self._memory.pool

    # ---- called by the data plane -----------------------------------------------------------------------------

    def lost(self, hello: Hello) -> None:
        """See ``AgentListener``."""
        if (registry := self._registries.get(hello.dp_client_id)) is not None:
            registry.lost(hello)

    def close(self) -> None:
        """See ``AgentListener``."""
        for registry in list(self._registries.values()):
            registry.close()
        for nodes in list(self._nodes.values()):
            nodes.close()

    def free(self) -> None:
        """See ``AgentListener``."""
        self._memory.leave()
        if not self._keeps_memory:
            self._memory.close()
