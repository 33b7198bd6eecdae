"""KVTPClient: a rank, as upstream's adapters use it."""

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from flexkv.at_exit import close_at_exit
from flexkv.config import TransferConfig, load_config
from flexkv.errors import AgentLostError, RegistrationError
from flexkv.protocol.layer_signals import layerwise_socket
from flexkv.rank.kv_layout import KVCacheLayout
from flexkv.rank.layer_signals import LayerSignals
from flexkv.rank.rank import CONNECT_TIMEOUT_S, RankClient
from flexkv.rank.regions import TensorSpec
from flexkv.rank.results import OpResult
from flexkv.rank.shared_tensor import TensorSharedHandle, local_specs
from flexkv.rank.tensors import KVTensor

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("flexkv.rank")


def _layers_of(num_tensors: int, num_layers: int) -> list[int]:
    """The layer of each of a list of tensors: one after the other, and again for V where K and V are apart."""
    return [i % num_layers if num_tensors % num_layers == 0 else i for i in range(num_tensors)]


def _close_all(fds: list[list[int]] | None) -> None:
    for row in fds or ():
        for fd in row:
            os.close(fd)


class KVTPClient:
    """A rank that registers tensors of a framework and waits for the controller.

    With the setting ``enable_layerwise_transfer`` it receives the eventfds of a rank of SGLang at the socket of
    ``build_layerwise_eventfd_socket_path``, and layerwise loads signal each layer with its eventfd.

    The parameters are those of ``RankClient``.

    Attributes
    ----------
    rank : RankClient
        The rank to which this client forwards its calls.
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
        self._dp_client_id = dp_client_id
        self._pp_rank = pp_rank
        self._config = transfer_config or load_config().transfer
        self.rank = RankClient(
            gpu_register_port, dp_client_id, device_id, pp_rank, intra_client_id, self._config,
            reconnect=self._config.uses_daemon or bool(self._config.node_secret),
        )
        self._lock = threading.Lock()
        self._signals: LayerSignals | None = None
        self._eventfds: list[list[int]] | None = None    # of each counter, one a layer; under the lock

    def register_to_server(
        self,
        kv_caches: "Sequence[torch.Tensor | TensorSharedHandle]",
        kv_layout: KVCacheLayout,
        override_device_id: int | None = None,
        layer_groups: list[list[int]] | None = None,
        gpu_layouts: list[KVCacheLayout] | None = None,
        handles_per_group: None = None,
        swa_caches: None = None,
        swa_layout: None = None,
        swa_layer_groups: None = None,
        swa_gpu_layouts: None = None,
        swa_handles_per_group: None = None,
        resume: bool = False,
        indexer_buffers: "Sequence[torch.Tensor | TensorSharedHandle] | None" = None,
        indexer_layout: KVCacheLayout | None = None,
    ) -> None:
        """Register tensors with the arguments of upstream's adapters, and wait until the agent runs. Results are not
        kept for ``poll_results``.

        Parameters
        ----------
        kv_caches : list of Tensor or TensorSharedHandle
            Their first dimension counts pages, or token slots (``num_block * tokens_per_block`` of them). Tensors of
            different shapes together make one block. Handles are open until ``suspend_gpu_mappings`` or ``close``.
        kv_layout : KVCacheLayout
            Layout of all tensors that no group of ``layer_groups`` contains.
        layer_groups, gpu_layouts : list of list of int, list of KVCacheLayout
            For each group, the indices of its tensors in ``kv_caches``, and its layout.
        indexer_buffers, indexer_layout : list of Tensor or TensorSharedHandle, KVCacheLayout
            Further tensors of the same blocks, and their layout (default: ``kv_layout``).
        resume : bool
            Must be True after ``suspend_gpu_mappings``, and False otherwise. The tensors may be at other addresses.

        Raises
        ------
        RegistrationError
            The tensors do not fit the layout, an argument is not available in this version, the controller refuses the
            tensors, or none answers.
        """
        unavailable = {
            "handles_per_group": handles_per_group, "swa_caches": swa_caches, "swa_layout": swa_layout,
            "swa_layer_groups": swa_layer_groups, "swa_gpu_layouts": swa_gpu_layouts,
            "swa_handles_per_group": swa_handles_per_group,
        }
        given = [name for name, value in unavailable.items() if value is not None]
        if given:
            raise RegistrationError(f"{', '.join(given)}: not available in this version; leave it out")
        if resume != self.rank.is_suspended:
            raise RegistrationError("resume=True goes with suspend_gpu_mappings: one without the other")
        layouts = [kv_layout] * len(kv_caches)
        for group, layout in zip(layer_groups or (), gpu_layouts or (), strict=True):
            for index in group:
                layouts[index] = layout
        indexers = list(indexer_buffers or ())
        tensors, layouts = [*kv_caches, *indexers], layouts + [indexer_layout or kv_layout] * len(indexers)
        layers = _layers_of(len(kv_caches), kv_layout.num_layer) + _layers_of(len(indexers), kv_layout.num_layer)
        order = sorted(range(len(tensors)), key=layers.__getitem__)
        close_at_exit(self, type(self).close)
        if self._config.enable_layerwise_transfer and self._signals is None:
            path = layerwise_socket(self._dp_client_id, self._pp_rank)
            self._signals = LayerSignals(path, max(layers) + 1, self._take_eventfds)
        with ExitStack() as opened:
            specs = local_specs(tensors, layouts, opened)
            self.rank.register_tensors(
                [specs[i] for i in order], keep_alive=tensors, layers=sorted(layers), opened=opened,
                intra_client_id=override_device_id,
                keep_outcomes=False,                 # upstream's adapters ask the KVManager alone
            )
        self.rank.wait_connected(CONNECT_TIMEOUT_S)
        if self._eventfds is not None:               # of before ``suspend_gpu_mappings``
            self._take_eventfds(self._eventfds)

    def _take_eventfds(self, fds: list[list[int]]) -> None:
        with self._lock:
            self.rank.signal_layers(fds)
            before, self._eventfds = self._eventfds, fds
        if before is not fds:
            _close_all(before)

    def suspend_gpu_mappings(self) -> int:
        """Stop moving blocks, and release the tensors: they may be unmapped afterwards. Cached blocks stay in the host
        tier.

        Returns
        -------
        int
            Number of tensors released.
        """
        return self.rank.suspend()

    def set_slot_mapping(self, task_id: int, slot_mapping: NDArray[np.int64]) -> None:
        """Not available in this version: upstream's call for ranks on other nodes than the controller's.

        Raises
        ------
        AgentLostError
            Always.
        """
        raise AgentLostError("ranks on other nodes are not available in this version")

    def close(self) -> None:
        """Stop the agent and release the tensors. Can be called again.

        Raises
        ------
        CudaError
            A handle's mapping could not be closed; the agent has stopped.
        """
        if self._signals is not None:
            self._signals.close()
            self._signals = None
        try:
            self.rank.close()
        finally:                                     # after the agent, which writes them
            _close_all(self._eventfds)
            self._eventfds = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- as RankClient ----------------------------------------------------------------------------------------

    def register_tensors(
        self, tensors: "Sequence[TensorSpec | KVTensor]", connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keep_alive: object = None,
    ) -> None:
        """Register the tensors that hold KV, one for each layer, and return; see ``RankClient.register_tensors``."""
        self.rank.register_tensors(tensors, connect_timeout_s, keep_alive)

    def wait_connected(self, timeout_s: float) -> None:
        """Wait until the agent runs; RegistrationError after ``timeout_s`` seconds, or if connecting has failed."""
        self.rank.wait_connected(timeout_s)

    def suspend(self) -> int:
        """Stop moving blocks and release the tensors, until ``register_tensors``; returns their number."""
        return self.rank.suspend()

    @property
    def error(self) -> Exception | None:
        """The error that made connecting fail permanently; None: there is none."""
        return self.rank.error

    @property
    def is_connected(self) -> bool:
        """Whether the agent runs and the controller is alive."""
        return self.rank.is_connected

    @property
    def is_lost(self) -> bool:
        """Whether no more results can arrive: connecting failed, the controller has ended, or this client is closed."""
        return self.rank.is_lost

    def advance_fence(self, load: int | None = None, save: int | None = None, stream: int | None = None) -> None:
        """Let loads (saves) start whose fence is at most ``load`` (``save``); see ``RankClient.advance_fence``."""
        self.rank.advance_fence(load, save, stream)

    def follow_load(self, task_id: int, tensor: int | None, timeout_s: float, stream: int | None = None) -> bool:
        """Make compute that is submitted to ``stream`` from now on wait until a layerwise load has filled a tensor; see
        ``RankClient.follow_load``."""
        return self.rank.follow_load(task_id, tensor, timeout_s, stream)

    def poll_results(self) -> list[OpResult]:
        """Results of the tasks that ended on this rank since the last call."""
        return self.rank.poll_results()

    def wait_results(self, timeout_s: float) -> bool:
        """Wait until ``poll_results`` has a result or can never have one again; False after ``timeout_s`` seconds."""
        return self.rank.wait_results(timeout_s)


__all__ = ["KVTPClient", "OpResult"]
