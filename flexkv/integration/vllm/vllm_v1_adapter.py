"""The class that vLLM's ``FlexKVConnectorV1`` forwards to: one object in the scheduler, one in each worker."""

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.platforms import current_platform

from flexkv.config import FlexKVConfig, ModelConfig, engine_config, runtime_directory, warn_overruled
from flexkv.errors import FlexKVError, RegistrationError
from flexkv.integration.vllm.boundary import GuardedScheduler, GuardedWorker
from flexkv.integration.vllm.context_parallel import layout_name, num_shares, page_tokens, share_of_rank
from flexkv.integration.vllm.data_parallel import data_parallel_rank, settings_of_rank
from flexkv.integration.vllm.identity import identify
from flexkv.integration.vllm.log import follow_vllm_log
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata
from flexkv.integration.vllm.nodes import num_nodes, settings_of_nodes, start_storage_host, unsupported_nodes
from flexkv.integration.vllm.off import OffScheduler, OffWorker
from flexkv.integration.vllm.replicas import copy_name
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.stop import warn_of_short_stop
from flexkv.integration.vllm.support import (
    find_kv_cache_config,
    unsupported,
    unsupported_layers,
    unsupported_tensors,
)
from flexkv.integration.vllm.worker import WorkerSide, find_metadata
from flexkv.rank.rank import RankClient
from flexkv.server.connect import connect
from flexkv.server.launch import with_daemon
from flexkv.server.node_launch import TransferManagerOnRemote

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")


def _settings(vllm_config: "VllmConfig", rank: int) -> FlexKVConfig:
    """Settings of this engine. ``kv_connector_extra_config`` overrides file and environment."""
    config = engine_config(vllm_config.kv_transfer_config.kv_connector_extra_config, follow_vllm_log)
    config = settings_of_rank(replace(config, transfer=with_daemon(config.transfer)), rank)
    return settings_of_nodes(vllm_config, config, rank)


def _register_port(vllm_config: "VllmConfig", config: FlexKVConfig) -> str:
    """Path at which the engine's ranks register. It is derived from the engine id, which all processes of vLLM have."""
    if config.transfer.gpu_register_port:
        return config.transfer.gpu_register_port
    engine = hashlib.sha256(str(vllm_config.kv_transfer_config.engine_id).encode()).hexdigest()[:24]
    return f"{runtime_directory()}/vllm-{engine}.sock"


def _model_config(vllm_config: "VllmConfig") -> ModelConfig:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    name = str(model.dtype).removeprefix("torch.") if dtype == "auto" else str(dtype)
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    identity = identify(vllm_config)
    if identity.unknown:
        logger.warning("KV is kept for this process only: %s", identity.unknown)
    named = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
    return ModelConfig(
        num_layers=model.get_num_layers(parallel) * parallel.pipeline_parallel_size,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        dtype=named.get(name, name),
        use_mla=bool(model.use_mla),
        tp_size=parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
        nnodes=num_nodes(vllm_config),
        model_id=str(model.model),
        revision=str(model.revision or ""),
        weights_id=identity.weights_id,
        config_digest=identity.config_digest,
        engine=f"vllm {vllm_version} {current_platform.device_name} {backend} {layout_name(vllm_config)}".rstrip(),
    )


def _steps_in_flight(vllm_config: "VllmConfig") -> int:
    """Number of steps that vLLM schedules before it has the result of the oldest. For versions of vLLM without the
    property it is estimated."""
    several = getattr(getattr(vllm_config, "scheduler_config", None), "async_scheduling", False)
    several = several or vllm_config.parallel_config.pipeline_parallel_size > 1
    return int(getattr(vllm_config, "max_concurrent_batches", 2 if several else 1))


class FlexKVConnectorV1Impl:
    """Implementation of vLLM's connector interface, called by ``FlexKVConnectorV1``.

    If FlexKV does not support the engine (``support.py``), caching is off: one line of the log gives the reason, and
    the engine runs without FlexKV.

    Parameters
    ----------
    vllm_config : VllmConfig
    role : KVConnectorRole
        SCHEDULER: owns the controller. WORKER: owns the rank's device agent.

    Raises
    ------
    ConfigError
        A setting is wrong.
    """

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole) -> None:
        rank = data_parallel_rank(vllm_config)
        config = _settings(vllm_config, rank)
        self._config = config
        self._vllm_config = vllm_config
        reason = unsupported(vllm_config) or unsupported_nodes(vllm_config, config)
        self._scheduler = GuardedScheduler(None, page_tokens(vllm_config) if reason is None else 1)
        self._worker = GuardedWorker(None)
        self._storage_host: TransferManagerOnRemote | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler.side = self._make_scheduler(rank) if reason is None else self._off(reason)
        else:
            self._worker.side = self._make_worker(rank) if reason is None else OffWorker()

    def _make_scheduler(self, rank: int) -> SchedulerSide | OffScheduler:
        vllm_config, config = self._vllm_config, self._config
        try:
            model = _model_config(vllm_config)
        except Exception as error:      # vLLM's properties may raise anything  # noqa: BLE001
            return self._off(f"the model cannot be described ({type(error).__name__}: {error})")
        tokens = page_tokens(vllm_config)
        given = config.cache.tokens_per_block
        warn_overruled(config.given, "tokens_per_block", given, tokens, "the block size of vLLM's scheduler")
        controller = connect(
            model, config.cache.replace(tokens_per_block=tokens), config.transfer, rank,
            _register_port(vllm_config, config),
            note=f"{vllm_config.kv_transfer_config.kv_role}, saves {config.connector.save_mode}",
        )
        warn_of_short_stop(vllm_config, config.cache)
        controller.start()
        layerwise = config.connector.layerwise_loads
        if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            layerwise = "never"                    # a full graph does not call wait_for_layer_load
        transfer = vllm_config.kv_transfer_config
        return SchedulerSide(
            controller, tokens, config.connector.replace(layerwise_loads=layerwise),
            may_load=getattr(transfer, "is_kv_consumer", True), may_save=getattr(transfer, "is_kv_producer", True),
            max_in_flight=_steps_in_flight(vllm_config),
        )

    def _make_worker(self, rank: int) -> WorkerSide:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        transfer, port = self._config.transfer, _register_port(self._vllm_config, self._config)
        if num_nodes(self._vllm_config) > 1:
            self._storage_host = start_storage_host(self._vllm_config, self._config, port)
        reconnects = transfer.uses_daemon or num_nodes(self._vllm_config) > 1
        client = RankClient(
            port, dp_client_id=rank, pp_rank=get_pp_group().rank_in_group,
            intra_client_id=get_tensor_model_parallel_rank(), transfer_config=transfer, reconnect=reconnects,
        )
        # a controller ends a transfer after ten times op_timeout_s in any case
        leave_after_s = 12 * transfer.op_timeout_s if reconnects else math.inf
        copy = copy_name(self._vllm_config, get_tensor_model_parallel_rank(), share_of_rank(self._vllm_config))
        layout = partial(layout_name, self._vllm_config)
        return WorkerSide(client, self._config.connector, copy, leave_after_s, layout)

    def _off(self, reason: str) -> OffScheduler:
        logger.warning("KV caching is off: %s. The engine runs without FlexKV", reason)
        return OffScheduler()

    @property
    def scheduler(self) -> SchedulerSide | OffScheduler:
        """The scheduler's half; FlexKVError on a worker, or after an error that has ended caching."""
        if self._scheduler.side is None:
            raise FlexKVError("a scheduler's method was called on a worker's connector")
        return self._scheduler.side

    @property
    def worker(self) -> WorkerSide | OffWorker:
        """The worker's half; FlexKVError on the scheduler, or after an error that has ended caching."""
        if self._worker.side is None:
            raise FlexKVError("a worker's method was called on a scheduler's connector")
        return self._worker.side

    def shutdown(self) -> None:
        """Stop all threads and free all memory."""
        self._scheduler.shutdown()
        self._worker.shutdown()
        if self._storage_host is not None:
            self._storage_host.shutdown()

    # ---- worker -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """Register the KV cache of each layer. If FlexKV does not support it, the rank does not register, and caching
        is off."""
        reason = self._worker.call(lambda side: self._register(side, kv_caches), None)
        if reason is not None:
            logger.warning("KV caching is off: %s. The engine runs without FlexKV", reason)
            self._worker.shutdown()
            self._worker.side = OffWorker()

    def _register(self, side: WorkerSide | OffWorker, kv_caches: "dict[str, torch.Tensor]") -> str | None:
        """Register the rank; returns the reason if that is impossible, else None."""
        reason = self._unsupported_caches(kv_caches)
        if reason is None:
            num_blocks = self._vllm_config.cache_config.num_gpu_blocks
            try:
                side.register_kv_caches(kv_caches, num_blocks, self._config.transfer.connect_timeout_s)
            except RegistrationError as error:
                reason = str(error)
        return reason

    def _unsupported_caches(self, kv_caches: "dict[str, torch.Tensor]") -> str | None:
        if self._vllm_config.cache_config.num_gpu_blocks is None:
            return "vLLM does not pass the number of KV blocks, and the shapes of the tensors do not determine it"
        config = find_kv_cache_config(self)
        if config is None:
            return None
        block_size, shares = self._vllm_config.cache_config.block_size, num_shares(self._vllm_config)
        return unsupported_layers(config, block_size, shares) or unsupported_tensors(kv_caches, config)

    def start_load_kv(self, forward_context: "ForwardContext | None", **kwargs: Any) -> None:
        """Start the step's loads. vLLM 0.32 calls it after it has launched compute, unless compute needs the loads."""
        self._worker.start_load(find_metadata(self))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for the step's layerwise loads of a layer; called before its attention.

        The call for the first layer also starts the step's other loads. They need not wait for the step's compute,
        which uses none of their pages."""
        self._worker.wait_for_layer(layer_name, self._find_metadata)

    def _find_metadata(self) -> FlexKVConnectorMetadata | None:
        return find_metadata(self)

    def save_kv_layer(
        self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """Do nothing: blocks are saved as a whole, after the step."""

    def wait_for_save(self) -> None:
        """Start the step's saves; called after its compute."""
        self._worker.wait_for_save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose saves have ended, and requests whose loads have ended."""
        saved, loaded = self._worker.get_finished()
        return saved or None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages whose block could not be loaded; vLLM computes them (``kv_load_failure_policy: recompute``)."""
        return self._worker.take_failed_pages()

    # ---- scheduler --------------------------------------------------------------------------------------------

    def on_new_request(self, request: "Request") -> None:
        """Start the prefetch of a queued request. vLLM's stock connector does not forward this call;
        ``connector.FlexKVConnector`` does."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Number of tokens that can be loaded, and whether the load is asynchronous. None: vLLM must repeat the query
        in a later step."""
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Launch the load of ``num_external_tokens`` tokens into newly allocated blocks."""
        self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> FlexKVConnectorMetadata:
        """Metadata of the next step for the workers."""
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Record the workers' report of a step. vLLM does not call it for an empty report."""
        self._scheduler.update_connector_output(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must stay until its saves are done."""
        return self._scheduler.request_finished(request, block_ids)

    def reset_cache(self) -> bool:
        """Drop all cached KV. vLLM's stock connector does not forward this call; ``connector.FlexKVConnector`` does."""
        return self._scheduler.reset_cache()

    def take_events(self) -> "Iterable[KVCacheEvent]":
        """Returns no events in this version. vLLM calls it once after each processed step, in order, so the calls
        determine the step of each report."""
        self._scheduler.step_ended()
        return ()

    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        """Returns no statistics in this version."""
        return None
