"""A rank: its KV tensors, and the agent that copies blocks from and to them."""

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np

from flexkv._core.device.agent import DeviceAgent
from flexkv._core.device.cuda_driver import Device, load_driver
from flexkv.at_exit import close_at_exit
from flexkv.config import TransferConfig, load_config
from flexkv.errors import RegistrationError
from flexkv.protocol.numbers import fence_of
from flexkv.protocol.registration import NUM_FDS, Hello, Welcome
from flexkv.protocol.ring import OpKind
from flexkv.protocol.sockets import socket_path
from flexkv.rank.gds_worker import GdsWorker
from flexkv.rank.handshake import abandon, join_controller
from flexkv.rank.kernels import move_function
from flexkv.rank.memory import RankMemory
from flexkv.rank.pool_pinning import PoolPinner
from flexkv.rank.regions import TensorSpec
from flexkv.rank.results import OpResult
from flexkv.rank.tensors import KVTensor, tensor_spec

logger = logging.getLogger("flexkv.rank")

CONNECT_TIMEOUT_S = 60.0

_left_behind: list[tuple[object, ExitStack]] = []
"""Owners of memory that a hanging GPU may still access; kept until the process ends."""

_CLOSE_S = 10.0
"""Maximum time that ``close`` waits for the thread that registers and pins, in seconds. A part is pinned in 10 to
100 ms, so only a hanging driver takes this long."""


class RankClient:
    """One rank: its tensors, and the native thread that moves blocks between them and the host tier.

    Parameters
    ----------
    gpu_register_port : str
        Path of the controller's Unix socket, or an ``ipc://`` address.
    dp_client_id : int
        Data-parallel rank of the engine.
    device_id : int
        Device of this rank. It is also the rank's number if ``intra_client_id`` is not given.
    pp_rank : int
        Pipeline-parallel rank.
    intra_client_id : int, optional
        Rank within the pipeline stage (tensor parallel).
    transfer_config : TransferConfig, optional
        Settings of copies between pages and host memory; default: ``FLEXKV_CONFIG_PATH`` and ``FLEXKV_*`` variables.
    """

    def __init__(
        self,
        gpu_register_port: str,
        dp_client_id: int = 0,
        device_id: int = 0,
        pp_rank: int = 0,
        intra_client_id: int | None = None,
        transfer_config: TransferConfig | None = None,
    ) -> None:
        self._path = socket_path(gpu_register_port)
        self._dp_client_id = dp_client_id
        self._pp_rank = pp_rank
        self._rank = device_id if intra_client_id is None else intra_client_id
        self._config = transfer_config or load_config().transfer
        self._device: Device | None = None
        self._streams: dict[bool, int] = {}          # stream of the last fence of loads (True), of saves
        self._agent: DeviceAgent | None = None
        self._gds: GdsWorker | None = None
        self._partial: dict[int, list[OpResult]] = {}
        self._connected = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._fences = (0, 0)
        self._keep_alive: object = None
        self._opened = ExitStack()                   # tensors of other processes
        self._keep_outcomes = True
        self._suspended = False
        self._num_tensors = 0
        self._layers: list[int] = []                 # layer of each tensor
        self._span_of_layer: list[int] = []
        self._lock = threading.Lock()
        self.error: Exception | None = None
        """The error that made connecting fail permanently, or None."""

    # ---- registration -----------------------------------------------------------------------------------------

    def register_tensors(
        self, tensors: "Sequence[TensorSpec | KVTensor]", connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keep_alive: object = None, *, layers: Sequence[int] | None = None, groups: Sequence[int] | None = None,
        copies: Sequence[str | None] | None = None, opened: ExitStack | None = None,
        intra_client_id: int | None = None, keep_outcomes: bool = True,
    ) -> None:
        """Register the tensors that hold KV, and return at once. A thread connects as soon as the controller listens.

        Parameters
        ----------
        tensors : sequence of ndarray, torch.Tensor or TensorSpec
            One for each layer. The first dimension of an array or tensor counts pages; ``tensor_spec`` describes
            others. The memory of a TensorSpec must stay valid until ``close``; arrays and tensors are kept until then.
        connect_timeout_s : float
            Time in seconds after which connecting fails.
        keep_alive : object
            Owner of the memory of TensorSpecs; a reference is kept until ``close``.
        layers, groups, copies : sequence, optional
            Layer and layer group of each tensor, and the name of the copy that it shares with other ranks; see
            ``RankMemory``.
        opened : ExitStack, optional
            Owner of memory of the specs. The client takes it over; ``close`` and ``suspend`` close it.
        intra_client_id : int, optional
            Replaces the constructor's ``intra_client_id``; None: keeps it.
        keep_outcomes : bool
            False: results are not kept, and ``poll_results`` returns none.

        Raises
        ------
        RegistrationError
            The tensors cannot be divided into pages, are on several devices, or were registered before.
        CudaUnavailableError, CudaError
            The tensors are on a GPU that cannot be used.
        """
        specs = [tensor if isinstance(tensor, TensorSpec) else tensor_spec(tensor) for tensor in tensors]
        memory = RankMemory(specs, layers, groups, copies)
        if self._thread is not None:
            raise RegistrationError("this rank has registered its tensors already")
        devices = {spec.device for spec in specs}
        if len(devices) > 1:
            raise RegistrationError(f"tensors on devices {devices}: a rank's tensors must be on one")
        ordinal = devices.pop()
        self._device = None if ordinal is None else load_driver().device(ordinal)
        self._rank = self._rank if intra_client_id is None else intra_client_id
        self._keep_outcomes = keep_outcomes
        self._keep_alive = keep_alive, list(tensors)
        self._num_tensors = len(specs)
        close_at_exit(self, type(self).close)
        if self._suspended:
            self._suspended, self.error = False, None
            self._connected, self._closing = threading.Event(), threading.Event()
        self._layers = memory.layers
        if opened is not None:
            self._opened = opened.pop_all()
        hello = Hello(
            self._dp_client_id, self._pp_rank, self._rank, os.getpid(), memory.num_pages, memory.segments
        )
        deadline = time.monotonic() + connect_timeout_s
        self._thread = threading.Thread(
            target=self._connect, args=(hello, memory, deadline), name="flexkv-register", daemon=True
        )
        self._thread.start()

    def suspend(self) -> int:
        """Stop moving blocks and release the tensors, until ``register_tensors``; returns their number."""
        if self._thread is None or self._closing.is_set():
            return 0
        self._closing.set()
        self._stop()
        self._thread, self._suspended, self._keep_alive = None, True, None
        self._partial.clear()                        # their tasks never end; another controller counts from 1 again
        self._opened.close()
        count, self._num_tensors = self._num_tensors, 0
        return count

    def _connect(self, hello: Hello, memory: RankMemory, deadline: float) -> None:
        try:
            connection, welcome, fds = join_controller(self._path, hello, deadline, self._closing)
            self._start_agent(connection, welcome, fds, hello, memory)
        except Exception as error:
            self.error = error
            if not self._closing.is_set():
                logger.error("this rank cannot load or save KV: %s", error)
        finally:
            self._connected.set()

    def _start_agent(
        self, connection: socket.socket, welcome: Welcome, fds: list[int], hello: Hello, memory: RankMemory
    ) -> None:
        gds_end = socket.socket(fileno=fds.pop()) if len(fds) > NUM_FDS else None
        with ExitStack() as undo:                    # closes the resources owned here if a step fails
            if gds_end is not None:
                undo.callback(gds_end.close)
            with ExitStack() as theirs:
                theirs.callback(abandon, connection, fds)
                table = memory.copy_table(welcome.placements)
                move = 0 if self._device is None else move_function(self._device)
                theirs.pop_all()                     # the agent owns them from here on
            agent = DeviceAgent(
                regions=table.regions,
                num_pages=hello.num_pages,
                spans=table.spans,
                saves=table.saves,
                loads=table.loads,
                layers=table.layers,
                pool_fd=fds[0],
                pool_bytes=welcome.pool_bytes,
                slot_bytes=welcome.slot_bytes,
                ring_fd=fds[1],
                ring_bytes=welcome.ring_bytes,
                submission_event_fd=fds[2],
                completion_event_fd=fds[3],
                socket_fd=connection.detach(),
                keep_outcomes=self._keep_outcomes,
                device=self._device,
                move_function=move,
                strategy=self._config.gpu_strategy,
                window_bytes=self._config.gpu_window_mb << 20,
                num_ctas=self._config.gpu_num_ctas,
            )
            undo.callback(agent.close)
            gds = None
            if gds_end is not None:
                gds = GdsWorker(
                    gds_end, self._device, table.regions[: table.num_load_regions], hello.num_pages[0],
                    welcome.slot_bytes, self._config.gpu_num_ctas,
                )
            undo.pop_all()
        with self._lock:
            self._span_of_layer = table.span_of_layer
            self._agent, self._gds = agent, gds
            for load, stream in self._streams.items():
                agent.fence(stream, load, self._fences[not load])
                if gds is not None:
                    gds.advance(*self._fences, stream)
            agent.advance(*self._fences)
            if gds is not None:
                gds.advance(*self._fences, None)
        self._connected.set()
        PoolPinner(agent, self._closing.wait).run()

    def wait_connected(self, timeout_s: float) -> None:
        """Wait until the agent runs.

        Raises
        ------
        RegistrationError
            The agent does not run after ``timeout_s`` seconds, or connecting has failed permanently.
        """
        if not self._connected.wait(timeout_s):
            raise RegistrationError(f"not registered after {timeout_s:g} s: start the controller and every rank")
        if self.error is not None:
            raise RegistrationError(str(self.error)) from self.error

    @property
    def name(self) -> str:
        """Identity of the rank: data-parallel client, pipeline stage, rank."""
        return f"{self._dp_client_id}-{self._pp_rank}-{self._rank}"

    @property
    def is_suspended(self) -> bool:
        """Whether ``suspend`` was called, and no tensors were registered since."""
        return self._suspended

    @property
    def is_connected(self) -> bool:
        """Whether the agent runs and the controller is alive."""
        return self._agent is not None and self._agent.status == 0

    @property
    def is_lost(self) -> bool:
        """Whether no more results can arrive: connecting failed, the controller has ended, or this client is closed."""
        ended = self._connected.is_set() and self._agent is not None and self._agent.status != 0
        return self.error is not None or ended

    # ---- called by the rank's hooks ---------------------------------------------------------------------------

    def advance_fence(self, load: int | None = None, save: int | None = None, stream: int | None = None) -> None:
        """Let loads (saves) start whose fence is at most ``load`` (``save``).

        The compute that used (wrote) their pages must be done, or submitted to the CUDA stream with the handle
        ``stream``; the copies then wait for that stream.

        Raises
        ------
        ArgumentError
            A step is not an integer from 0 to 2**63 - 1; nothing has changed.
        CudaError
        """
        load, save = (None if fence is None else fence_of(fence) for fence in (load, save))
        with self._lock:
            for is_load, fence in ((True, load), (False, save)):
                if fence is not None and stream is not None:
                    self._streams[is_load] = stream
                    if self._agent is not None:
                        self._agent.fence(stream, is_load, fence)
            self._fences = (max(self._fences[0], load or 0), max(self._fences[1], save or 0))
            if self._agent is not None:
                self._agent.advance(*self._fences)
            if self._gds is not None:
                self._gds.advance(*self._fences, stream)

    def follow_load(self, task_id: int, tensor: int | None, timeout_s: float, stream: int | None = None) -> bool:
        """Make compute that is submitted to ``stream`` from now on wait until a layerwise load has filled a tensor.

        Parameters
        ----------
        task_id : int
        tensor : int, optional
            Index of the tensor as registered; None: all of them.
        timeout_s : float
            Maximum time that the caller is blocked, in seconds. It is blocked until the copies are submitted to the
            GPU, not until they are done; without a GPU, until they are done.
        stream : int, optional
            Handle of a CUDA stream.

        Returns
        -------
        bool
            False: the agent has ended, or has not started the load in time. True does not mean that the load succeeds.

        Raises
        ------
        CudaError
        """
        if self._agent is None:
            return False
        span = max(self._span_of_layer) if tensor is None else self._span_of_layer[self._layers[tensor]]
        return self._agent.follow(task_id, span, timeout_s, stream or 0)

    def signal_layers(self, eventfds: list[list[int]]) -> None:
        """Let layerwise loads signal the eventfds of their counter, one for each layer. The caller owns them and must
        keep them open until they are replaced or the agent has stopped.

        Raises
        ------
        RegistrationError
            The agent does not run.
        """
        with self._lock:
            if self._agent is None:
                raise RegistrationError("the rank's tensors are not registered yet")
            self._agent.set_signals(eventfds, self._span_of_layer)

    def poll_results(self) -> list[OpResult]:
        """Results of the tasks that ended on this rank since the last call."""
        results: list[OpResult] = []
        while self._agent is not None and (outcome := self._agent.take()) is not None:
            task_id, kind, op_blocks, pages, ok = outcome
            parts = self._partial.pop(task_id, [])
            parts.append(OpResult(task_id, OpKind(kind), pages, ok))
            if sum(len(part.ok) for part in parts) < op_blocks:
                self._partial[task_id] = parts
                continue
            whole = np.concatenate([part.pages for part in parts], -1), np.concatenate([part.ok for part in parts])
            results.append(OpResult(task_id, OpKind(kind), whole[0], whole[1]))
            if not whole[1].all() and self._agent.device_error is not None:
                logger.error("task %d: blocks were not moved: %s", task_id, self._agent.device_error)
        return results

    def wait_results(self, timeout_s: float) -> bool:
        """Wait until ``poll_results`` has a result or can never have one again; False after ``timeout_s`` seconds."""
        agent = self._agent
        if agent is None or not self._connected.is_set():        # at first, and again after ``suspend``
            return self._connected.wait(min(timeout_s, threading.TIMEOUT_MAX))
        return agent.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the agent and release the tensors. Can be called again."""
        self._closing.set()
        self._stop()
        self._keep_alive = None
        self._opened.close()

    def _stop(self) -> None:
        """Stop thread, agent and GDS worker. Tensors that may still be accessed afterwards go to ``_left_behind``."""
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        is_held = self._thread is not None and self._thread.is_alive()
        if is_held:
            logger.error("the driver has not pinned a part of the host pool within %g s: agent and tensors stay until "
                         "this process ends", _CLOSE_S)
        with self._lock:
            gds, self._gds = self._gds, None
        is_at_rest = (gds is None or gds.close()) and not is_held
        if is_held:
            _left_behind.append((self._agent, ExitStack()))
            self._agent, self._thread = None, None
        elif self._agent is not None:
            is_at_rest = self._agent.close() and is_at_rest
        if not is_at_rest:
            _left_behind.append((self._keep_alive, self._opened.pop_all()))
