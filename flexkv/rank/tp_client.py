"""KVTPClient: a rank, as upstream's adapters use it."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import AgentLostError, RegistrationError
from flexkv.protocol.layer_signals import layerwise_socket
from flexkv.rank.kv_layout import KVCacheLayout
from flexkv.rank.layer_signals import LayerSignals
from flexkv.rank.rank import CONNECT_TIMEOUT_S, OpResult, RankClient
from flexkv.rank.shared_tensor import TensorSharedHandle, local_specs

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


class KVTPClient(RankClient):
    """A rank that registers tensors of a framework and waits for the controller.

    With the setting ``enable_layerwise_transfer`` it takes the eventfds of a rank of SGLang, at the socket of
    ``build_layerwise_eventfd_socket_path``, and layerwise loads tell of their layers there.
    """

    _signals: LayerSignals | None = None
    _eventfds: list[list[int]] | None = None         # of each counter, one a layer; under the lock

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
        """Register tensors as upstream's adapters do, and wait for the controller. There is nothing to poll then.

        Parameters
        ----------
        kv_caches : list of Tensor or TensorSharedHandle
            Their first dimension counts pages, or token slots (``num_block * tokens_per_block`` of them). Tensors of
            different shapes together make one block. Handles are open until ``suspend_gpu_mappings`` or ``close``.
        kv_layout : KVCacheLayout
            Of all tensors, where ``gpu_layouts`` does not say otherwise.
        layer_groups, gpu_layouts : list of list of int, list of KVCacheLayout
            Indices into ``kv_caches`` of each group, and the group's layout.
        indexer_buffers, indexer_layout : list of Tensor or TensorSharedHandle, KVCacheLayout
            More tensors of the same blocks.
        resume : bool
            After ``suspend_gpu_mappings``; the tensors may be at other addresses.

        Raises
        ------
        RegistrationError
            The tensors do not fit the layout, or the controller refuses them or is not there.
        """
        unavailable = {
            "handles_per_group": handles_per_group, "swa_caches": swa_caches, "swa_layout": swa_layout,
            "swa_layer_groups": swa_layer_groups, "swa_gpu_layouts": swa_gpu_layouts,
            "swa_handles_per_group": swa_handles_per_group,
        }
        given = [name for name, value in unavailable.items() if value is not None]
        if given:
            raise RegistrationError(f"{', '.join(given)}: not available in this version; leave it out")
        if resume != self._suspended:
            raise RegistrationError("resume=True goes with suspend_gpu_mappings: one without the other")
        layouts = [kv_layout] * len(kv_caches)
        for group, layout in zip(layer_groups or (), gpu_layouts or (), strict=True):
            for index in group:
                layouts[index] = layout
        indexers = list(indexer_buffers or ())
        tensors, layouts = [*kv_caches, *indexers], layouts + [indexer_layout or kv_layout] * len(indexers)
        layers = _layers_of(len(kv_caches), kv_layout.num_layer) + _layers_of(len(indexers), kv_layout.num_layer)
        order = sorted(range(len(tensors)), key=layers.__getitem__)
        if override_device_id is not None:
            self._rank = override_device_id
        self._keep_outcomes = False                  # upstream's adapters ask the KVManager alone
        if self._config.enable_layerwise_transfer and self._signals is None:
            path = layerwise_socket(self._dp_client_id, self._pp_rank)
            self._signals = LayerSignals(path, max(layers) + 1, self._take_eventfds)
        with ExitStack() as opened:
            specs = local_specs(tensors, layouts, opened)
            self.register_tensors(
                [specs[i] for i in order], keep_alive=tensors, layers=sorted(layers), opened=opened
            )
        self.wait_connected(CONNECT_TIMEOUT_S)
        if self._eventfds is not None:               # of before ``suspend_gpu_mappings``
            self._take_eventfds(self._eventfds)

    def _take_eventfds(self, fds: list[list[int]]) -> None:
        with self._lock:
            if self._agent is None:
                raise RegistrationError("the rank's tensors are not registered yet")
            self._agent.set_signals(fds, self._span_of_layer)
            before, self._eventfds = self._eventfds, fds
        if before is not fds:
            _close_all(before)

    def suspend_gpu_mappings(self) -> int:
        """Stop moving blocks, and let the tensors go: they may be unmapped afterwards. What the host tier holds stays.

        Returns
        -------
        int
            How many tensors it was.
        """
        return self.suspend()

    def set_slot_mapping(self, task_id: int, slot_mapping: NDArray[np.int64]) -> None:
        """For ranks on other nodes than the controller's, which this version does not have.

        Raises
        ------
        AgentLostError
            Always.
        """
        raise AgentLostError("ranks on other nodes are not available in this version")

    def close(self) -> None:
        """Stop the agent and let the tensors go. Can be called again.

        Raises
        ------
        CudaError
            A handle's mapping could not be closed; the agent has stopped.
        """
        if self._signals is not None:
            self._signals.close()
            self._signals = None
        try:
            super().close()
        finally:                                     # after the agent, which writes them
            _close_all(self._eventfds)
            self._eventfds = None


__all__ = ["KVTPClient", "OpResult"]
