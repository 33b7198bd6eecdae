"""Start of a rank's agent: from the controller's WELCOME to the thread that moves blocks."""

import socket
from contextlib import ExitStack

from flexkv._core.device.agent import DeviceAgent
from flexkv._core.device.cuda_driver import Device
from flexkv.config import TransferConfig
from flexkv.protocol.registration import NUM_FDS, Hello, Welcome
from flexkv.rank.gds_worker import GdsWorker
from flexkv.rank.handshake import abandon
from flexkv.rank.kernels import move_function
from flexkv.rank.memory import RankMemory
from flexkv.rank.peers import open_peers


def start_agent(
    connection: socket.socket, welcome: Welcome, fds: list[int], hello: Hello, memory: RankMemory,
    device: Device | None, config: TransferConfig, keep_outcomes: bool,
) -> tuple[DeviceAgent, GdsWorker | None, list[int]]:
    """Start the agent, and the worker of GPUDirect Storage if the controller has sent a socket for it.

    ``connection`` and ``fds`` are those of ``join_controller``; they are closed, or belong to the agent, also if this
    raises. ``device``: None for pages in this process's memory.

    Returns
    -------
    agent : DeviceAgent
    gds : GdsWorker or None
    span_of_layer : list of int
        For each layer, the span of a layerwise load with its last byte.
    """
    gds_end = socket.socket(fileno=fds.pop()) if len(fds) > NUM_FDS else None
    with ExitStack() as undo:                        # closes the resources owned here if a step fails
        if gds_end is not None:
            undo.callback(gds_end.close)
        with ExitStack() as theirs:
            theirs.callback(abandon, connection, fds)
            imports, exchange = undo.enter_context(ExitStack()), welcome.exchange     # memory of peers
            peers = None if exchange is None else open_peers(exchange, memory, device, imports)
            table = memory.copy_table(welcome.placements, () if exchange is None else exchange.shares, peers)
            move = 0 if device is None else move_function(device)
            theirs.pop_all()                         # the agent owns them from here on
        agent = DeviceAgent(
            regions=table.regions,
            num_pages=hello.num_pages,
            spans=table.spans,
            saves=table.saves,
            loads=table.loads,
            layers=table.layers,
            shares=table.shares,
            peers=table.peers,
            imports=imports.pop_all() if table.peers[1] else None,
            pool_fd=fds[0],
            pool_bytes=welcome.pool_bytes,
            slot_bytes=welcome.slot_bytes,
            ring_fd=fds[1],
            ring_bytes=welcome.ring_bytes,
            submission_event_fd=fds[2],
            completion_event_fd=fds[3],
            socket_fd=connection.detach(),
            keep_outcomes=keep_outcomes,
            device=device,
            move_function=move,
            strategy=config.gpu_strategy,
            window_bytes=config.gpu_window_mb << 20,
            num_ctas=config.gpu_num_ctas,
        )
        undo.callback(agent.close)
        gds = None
        if gds_end is not None:
            gds = GdsWorker(
                gds_end, device, table.regions[: table.num_load_regions], hello.num_pages[0], welcome.slot_bytes,
                config.gpu_num_ctas,
            )
        undo.pop_all()
    return agent, gds, table.span_of_layer
