"""A rank: its KV tensors, and the agent that copies blocks from and to them."""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from flexkv._core.device.agent import DeviceAgent
from flexkv._core.device.cuda_driver import Device, load_driver
from flexkv.at_exit import close_at_exit
from flexkv.config import TransferConfig, load_config
from flexkv.errors import AgentLostError, RegistrationError
from flexkv.protocol.registration import Hello, Welcome
from flexkv.protocol.sockets import socket_path
from flexkv.rank.agent_in_use import AgentInUse
from flexkv.rank.agent_start import start_agent
from flexkv.rank.fences import Fences
from flexkv.rank.gds_worker import GdsWorker
from flexkv.rank.handshake import join_controller
from flexkv.rank.memory import RankMemory
from flexkv.rank.peers import export_copies
from flexkv.rank.pool_pinning import PoolPinner
from flexkv.rank.regions import TensorSpec
from flexkv.rank.results import OpResult, ResultQueue
from flexkv.rank.tensors import KVTensor, tensor_spec

logger = logging.getLogger("flexkv.rank")

CONNECT_TIMEOUT_S = 60.0

_left_behind: list[tuple[object, ExitStack]] = []
"""Owners of memory that a hanging GPU may still access; kept until the process ends."""

_RETRY_S = 0.5                                      # between two attempts to register again
_CLOSE_S = 10.0
"""Maximum time that ``close`` waits for the thread that registers and pins: only a hanging driver takes this long."""


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
    reconnect : bool
        Register again when the controller has ended, for as long as it takes: it is a daemon, which may be restarted.
    """

    def __init__(
        self,
        gpu_register_port: str,
        dp_client_id: int = 0,
        device_id: int = 0,
        pp_rank: int = 0,
        intra_client_id: int | None = None,
        transfer_config: TransferConfig | None = None,
        *,
        reconnect: bool = False,
    ) -> None:
        self._path = socket_path(gpu_register_port)
        self._dp_client_id, self._pp_rank = dp_client_id, pp_rank
        self._rank = device_id if intra_client_id is None else intra_client_id
        self._config = transfer_config or load_config().transfer
        self._device: Device | None = None
        self._gds: GdsWorker | None = None
        self._in_use, self._fences, self._results = AgentInUse(), Fences(), ResultQueue()
        self._first_task = 0                         # tasks of this controller have larger ids
        self._connected, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._keep_alive: object = None
        self._opened = ExitStack()                   # tensors of other processes
        self._suspended, self._num_tensors = False, 0
        self._layers, self._span_of_layer = list[int](), list[int]()    # layer of each tensor; span of each layer
        self._lock = threading.Lock()
        self._keep_outcomes, self._reconnect = True, reconnect
        self._signals: list[list[int]] | None = None
        self.writes = True                           # False: saves do not concern this rank; others write its copies
        self.error: Exception | None = None
        """The error that made connecting fail permanently, or None."""

    # ---- registration -----------------------------------------------------------------------------------------

    def register_tensors(
        self, tensors: "Sequence[TensorSpec | KVTensor]", connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keep_alive: object = None, *, layers: Sequence[int] | None = None, groups: Sequence[int] | None = None,
        copies: Sequence[str | None] | None = None, meaning: str = "", opened: ExitStack | None = None,
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
        layers, groups, copies, meaning
            See ``RankMemory``.
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
        memory = RankMemory(specs, layers, groups, copies, meaning)
        if self._thread is not None:
            raise RegistrationError("this rank has registered its tensors already")
        devices = {spec.device for spec in specs}
        if len(devices) > 1:
            raise RegistrationError(f"tensors on devices {devices}: a rank's tensors must be on one")
        ordinal = devices.pop()
        self._device = None if ordinal is None else load_driver().device(ordinal)
        self._rank = self._rank if intra_client_id is None else intra_client_id
        self._keep_outcomes, self._num_tensors = keep_outcomes, len(specs)
        self._keep_alive = keep_alive, list(tensors)
        close_at_exit(self, type(self).close)
        if self._suspended:
            self._suspended, self.error = False, None
            self._connected, self._closing = threading.Event(), threading.Event()
        exports, self._layers = export_copies(memory, self._device, opened is None), memory.layers
        if opened is not None:
            self._opened = opened.pop_all()
        hello = Hello(
            self._dp_client_id, self._pp_rank, self._rank, os.getpid(), memory.num_pages, memory.segments, exports
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
        self._results.forget_parts()                 # their tasks never end; another controller counts from 1 again
        self._opened.close()
        return self._num_tensors

    def _connect(self, hello: Hello, memory: RankMemory, deadline: float) -> None:
        """Register; with ``reconnect`` again and again, until this client is closed."""
        logged, goes_on = "", True
        try:
            while goes_on and not self._closing.is_set():
                try:
                    joined = join_controller(
                        self._path, hello, math.inf if self._reconnect else deadline, self._closing
                    )
                    self._start_agent(*joined, hello, memory)
                    logged, goes_on = "", self._reconnect and self._watch_agent()
                except (RegistrationError, OSError) as error:
                    if not self._reconnect:
                        raise
                    if str(error) != logged:
                        logger.warning("this rank cannot load or save KV yet: %s", error)
                    logged = str(error)
                    self._closing.wait(_RETRY_S)
        except Exception as error:
            self.error = error
            if not self._closing.is_set():
                logger.error("this rank cannot load or save KV: %s", error)
        finally:
            self._connected.set()

    def _watch_agent(self) -> bool:
        """Wait for the end of the agent, and release it; False: this client is closed, or the agent does not end."""
        if not self._in_use.wait_end(self._closing):
            return False
        with self._lock:
            agent, gds, self._gds = self._in_use.release(), self._gds, None
        self._keep_results(agent)
        if (gds is not None and not gds.close()) or (agent is not None and not agent.close()):
            _left_behind.append((self._keep_alive, self._opened.pop_all()))
            raise AgentLostError("the GPU hangs, so its pages cannot be registered again")
        self._results.forget_parts()                 # the rest of them does not come
        self._in_use.ended()
        if not self._closing.is_set():
            logger.warning("the controller at %s has ended: this rank registers again when it is back", self._path)
        return True

    def _start_agent(
        self, connection: socket.socket, welcome: Welcome, fds: list[int], hello: Hello, memory: RankMemory
    ) -> None:
        agent, gds, span_of_layer = start_agent(
            connection, welcome, fds, hello, memory, self._device, self._config, self._keep_outcomes
        )
        with self._lock:
            self._span_of_layer, self._first_task = span_of_layer, welcome.first_task
            self.writes = any(place.write_stop > place.write_start for place in welcome.placements)
            self._in_use.agent, self._gds = agent, gds
            self._fences.start(agent, gds)
            if self._signals is not None:
                agent.set_signals(self._signals, span_of_layer)
        self._connected.set()
        agent.take_part()                            # not before: without an agent, tasks count as lost
        PoolPinner(agent, partial(self._in_use.pause, self._closing)).run()
        self._in_use.watch_peers(self._closing)

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
    def _agent(self) -> DeviceAgent | None:
        return self._in_use.agent

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
        agent = self._agent
        return agent is not None and agent.status == 0

    @property
    def is_lost(self) -> bool:
        """Whether no more results can arrive: connecting failed, the controller has ended, or this client is closed.
        With ``reconnect`` this may change again."""
        agent = self._agent
        return self.error is not None or (self._connected.is_set() and (
            self._reconnect and not self._in_use.is_ending if agent is None else agent.status != 0
        ))

    @property
    def num_ended(self) -> int:
        """Number of registrations that have ended, with ``reconnect``."""
        return self._in_use.num_ended

    def has_lost(self, task_id: int, since: int) -> bool:
        """Whether no result of a task can arrive any more, but for one that ``poll_results`` returns now. ``since``:
        ``num_ended`` when the task became known."""
        return task_id <= self._first_task or since != self.num_ended or self.is_lost

    def leave(self) -> None:
        """Leave the controller, whose transfers do not end. With ``reconnect``, this rank registers again."""
        leave = self._in_use.must_leave.set if self._reconnect else self.close
        leave()

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
        with self._lock:
            self._fences.advance(self._agent, self._gds, load, save, stream)

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
        with self._in_use.using() as agent:
            if agent is None or task_id <= self._first_task:
                return False
            span = max(self._span_of_layer) if tensor is None else self._span_of_layer[self._layers[tensor]]
            return agent.follow(task_id, span, timeout_s, stream or 0)

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
            self._signals = eventfds if self._reconnect else None
            self._agent.set_signals(eventfds, self._span_of_layer)

    def poll_results(self) -> list[OpResult]:
        """Results of the tasks that ended on this rank since the last call."""
        with self._in_use.using() as agent:
            self._keep_results(agent)
        return self._results.take()

    def _keep_results(self, agent: DeviceAgent | None) -> None:
        while agent is not None and (outcome := agent.take()) is not None:
            if not self._results.add(*outcome) and agent.device_error is not None:
                logger.error("task %d: blocks were not moved: %s", outcome[0], agent.device_error)

    def wait_results(self, timeout_s: float) -> bool:
        """Wait until ``poll_results`` has a result or can never have one again; False after ``timeout_s`` seconds."""
        with self._in_use.using() as agent:
            if agent is not None and self._connected.is_set():
                return agent.wait(timeout_s)
        return self._connected.wait(min(timeout_s, threading.TIMEOUT_MAX))      # at first, and again after ``suspend``

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
            self._in_use.agent, self._thread = None, None
        elif self._agent is not None:
            is_at_rest = self._agent.close() and is_at_rest
        if not is_at_rest:
            _left_behind.append((self._keep_alive, self._opened.pop_all()))
