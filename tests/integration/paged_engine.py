"""vLLM's own scheduler and FlexKV's connector around ``paged_model``: one process, no weights, steps in flight."""

import copy
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.integration import paged_model
from tests.integration.paged_model import BLOCK, LAYERS, Chunk
from tests.support.harness import until

NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
HASH = __import__("vllm.utils.hashing", fromlist=["sha256"]).sha256


def make_config(directory: Path, num_pages: int, transfer: dict[str, Any] | None, **options: Any) -> Any:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)
    arguments = EngineArgs(
        model=str(directory), skip_tokenizer_init=True, dtype="float32", block_size=BLOCK, max_model_len=1024,
        enforce_eager=True, num_gpu_blocks_override=num_pages, enable_prefix_caching=True, disable_log_stats=True,
        disable_hybrid_kv_cache_manager=True, load_format="dummy",
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None, **options,
    )
    config = arguments.create_engine_config()
    config.cache_config.num_gpu_blocks = num_pages
    return config


class PagedWorker:
    """One rank: the tensors, the connector's worker half, and what the model runner knows of each request."""

    def __init__(self, connector: Any, num_pages: int, make_chunk: Callable[..., Any] = Chunk) -> None:
        self.connector = connector
        self._make_chunk = make_chunk
        self.caches = paged_model.blank(num_pages)
        self._requests: dict[str, dict[str, Any]] = {}
        if connector is not None:
            connector.register_kv_caches(dict(zip(NAMES, self.caches, strict=True)))

    def execute(self, output: Any, loras: dict[str, int]) -> ModelRunnerOutput:
        """One step, with the hooks in the order of vLLM's runners."""
        self.begin(output)
        chunks = self.make_chunks(output, loras)
        for layer, name in enumerate(NAMES if chunks else ()):
            self.wait_for_layer(name)
            for chunk in chunks.values():
                chunk.layer(self.caches[layer], layer)
        return self.end(output, self.sample(chunks))

    def begin(self, output: Any) -> None:
        for req_id in output.finished_req_ids:
            self._requests.pop(req_id, None)
        if self.connector is not None:
            self.connector.bind_connector_metadata(output.kv_connector_metadata)
            if output.has_sync_kv_loads:
                self.connector.start_load_kv(None)

    def wait_for_layer(self, name: str) -> None:
        if self.connector is not None:
            self.connector.wait_for_layer_load(name)

    def end(self, output: Any, sampled: dict[str, list[int]]) -> ModelRunnerOutput:
        connector, report = self.connector, KVConnectorOutput()
        if connector is not None:
            if not output.has_sync_kv_loads:
                connector.start_load_kv(None)
            connector.wait_for_save()
            results = connector.get_transfer_results(output.finished_req_ids)
            report.finished_sending, report.finished_recving = results.finished_sending, results.finished_recving
            report.invalid_block_ids = connector.get_block_ids_with_load_errors()
            report.kv_connector_worker_meta = connector.build_connector_worker_meta()
            connector.clear_connector_metadata()
        if not output.total_num_scheduled_tokens:
            # a copy, as it comes from another process: the aggregator writes into it, and it may be vLLM's constant
            return copy.copy(ModelRunnerOutput.with_kv_conn_output_only(report if connector is not None else None))
        return ModelRunnerOutput(
            req_ids=list(sampled), req_id_to_index={name: i for i, name in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()), kv_connector_output=report if connector is not None else None,
        )

    def _update(self, output: Any) -> dict[str, int]:
        computed = {}
        for new in output.scheduled_new_reqs:
            pages, tokens = list(new.block_ids[0]), list(new.prompt_token_ids)
            self._requests[new.req_id] = {"pages": pages, "tokens": tokens, "prompt": len(tokens)}
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for req_id, new_pages, start, num_out in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            request = self._requests[req_id]
            if req_id in cached.resumed_req_ids:
                request["pages"] = list(new_pages[0])
                request["tokens"] = list(cached.all_token_ids.get(req_id, request["tokens"]))
            elif new_pages is not None:
                request["pages"] += new_pages[0]
            del request["tokens"][request["prompt"] + num_out :]
            computed[req_id] = start
        return computed

    def make_chunks(self, output: Any, loras: dict[str, int]) -> dict[str, Any]:
        computed, chunks = self._update(output), {}
        for req_id, count in output.num_scheduled_tokens.items():
            request, start = self._requests[req_id], computed[req_id]
            tokens = np.array(request["tokens"][start : start + count])
            assert len(tokens) == count, "the scheduler knows of more tokens than the worker"
            chunks[req_id] = self._make_chunk(np.array(request["pages"]), start, tokens, loras.get(req_id, 0))
        return chunks

    def sample(self, chunks: dict[str, Any]) -> dict[str, list[int]]:
        sampled = {}
        for req_id, chunk in chunks.items():
            known = self._requests[req_id]["tokens"]
            done = chunk.start + len(chunk.positions) == len(known)
            sampled[req_id] = [paged_model.sample(chunk.hidden[-1])] if done else []
            known += sampled[req_id]
        return sampled


class PagedEngine:
    """The engine core's loop.

    Parameters
    ----------
    directory : Path
    num_pages : int
    settings : dict, optional
        FlexKV's; None: without FlexKV.
    depth : int
        Steps in flight; more than one: asynchronous scheduling.
    ranks : int
        Workers; each has the same KV.
    seed : int
        Of when steps that are in flight are executed.
    """

    def __init__(
        self, directory: Path, num_pages: int, settings: dict[str, Any] | None, depth: int = 1, ranks: int = 1,
        seed: int = 0, transfer: dict[str, Any] | None = None, batched_tokens: int = 256, max_seqs: int = 8,
    ) -> None:
        beside = (settings or {}).pop("beside", None)
        if settings is not None:
            transfer = {
                "kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "enable_metrics": False, "gpu_register_port": str(directory / "s"), **settings,
                },
                **(transfer or {}),
            }
        if beside is not None and transfer is not None:
            transfer = {
                "kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"connectors": [beside, transfer]},
            }
        self.config = make_config(
            directory / "model", num_pages, transfer, max_num_batched_tokens=batched_tokens, max_num_seqs=max_seqs,
        )
        self.config.scheduler_config.async_scheduling = depth > 1
        self.config.parallel_config.tensor_parallel_size = ranks
        self.adapt_config()
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=2, dtype=torch.float32)
        cache = KVCacheConfig(num_pages, [], [KVCacheGroupSpec(NAMES, spec)], hash_block_size=BLOCK)
        self.page_tokens, hash_block_size = resolve_kv_cache_block_sizes(cache, self.config)
        self._hasher = get_request_block_hasher(hash_block_size, HASH)
        init_none_hash(HASH)
        self.scheduler: Any = (AsyncScheduler if depth > 1 else Scheduler)(
            self.config, cache, StructuredOutputManager(self.config), self.page_tokens,
            hash_block_size=hash_block_size,
        )
        self.workers = [self._make_worker(rank, cache, num_pages, transfer) for rank in range(ranks)]
        self._join_workers()
        self._aggregator = KVOutputAggregator(ranks)
        self._depth, self._random = depth, random.Random(seed)
        self._queue: deque[list[Any]] = deque()             # [scheduler output, result or None], oldest first
        self.loras: dict[str, int] = {}
        self.answers: dict[str, list[int]] = {}
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self._tracked: dict[str, Any] = {}
        self.between_steps: Callable[[], None] = lambda: None

    def _make_worker(self, rank: int, cache: Any, num_pages: int, transfer: Any) -> PagedWorker:
        connector = None
        if transfer is not None:
            where = "vllm.distributed.parallel_state."
            with patch(where + "get_pp_group", lambda: SimpleNamespace(rank_in_group=0)), \
                    patch(where + "get_tensor_model_parallel_rank", lambda: rank):
                connector = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, cache)
        return self.make_worker(connector, num_pages)

    # ---- for engines whose ranks have different KV --------------------------------------------------------------

    def adapt_config(self) -> None:
        """Called before anything is made of the configuration."""

    def make_worker(self, connector: Any, num_pages: int) -> PagedWorker:
        return PagedWorker(connector, num_pages)

    def run_workers(self, output: Any) -> list[Any]:
        return [worker.execute(output, self.loras) for worker in self.workers]

    def pages_of(self, tokens: list[int], lora: int) -> list[list[torch.Tensor]]:
        """What computing a sequence writes: by rank and layer, its pages in order."""
        return [paged_model.compute(tokens, lora)[0]] * len(self.workers)

    def right_answer(self, prompt: list[int], count: int, lora: int) -> list[int]:
        return paged_model.answer(prompt, count, lora)

    def _join_workers(self) -> None:
        """vLLM's global connector, where the ranks' halves find the step's metadata."""
        connectors = [worker.connector for worker in self.workers if worker.connector is not None]
        children = [child for one in connectors for child in (one, *getattr(one, "_connectors", ()))]
        kv_transfer_state._KV_CONNECTOR_AGENT = SimpleNamespace(_connectors=children) if children else None

    # ---- requests ---------------------------------------------------------------------------------------------

    def request(self, name: str, prompt: list[int], tokens: int, salt: str | None = None, lora: int = 0) -> Any:
        return Request(
            name, list(prompt), SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True), None,
            cache_salt=salt, block_hasher=self._hasher,
            lora_request=LoRARequest(f"lora{lora}", lora, f"/nowhere/lora{lora}") if lora else None,
        )

    def add(self, name: str, prompt: list[int], tokens: int, salt: str | None = None, lora: int = 0) -> None:
        request = self.request(name, prompt, tokens, salt, lora)
        self.loras[name], self.answers[name], self.prompts[name] = lora, [], (list(prompt), lora)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    # ---- the loop ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule if there is room in the queue, else take the oldest result, as ``step_with_batch_queue`` does."""
        self.between_steps()
        if self.scheduler.has_requests() and len(self._queue) < self._depth:
            self.schedule()
            if len(self._queue) < self._depth and self._random.random() < 0.8:
                return
        if not self._queue:
            return
        self.execute(self._random.randint(1, len(self._queue)))
        self.end_step()

    def schedule(self) -> None:
        """Schedule a step; it is in flight then."""
        self._queue.append([self.scheduler.schedule(), None])

    def execute(self, count: int = 1) -> None:
        """The workers execute the oldest ``count`` steps in flight, but for those that they have executed."""
        for entry in list(self._queue)[:count]:
            if entry[1] is None:
                entry[1] = self._execute(entry[0])

    def end_step(self) -> None:
        """The scheduler processes the result of the oldest step."""
        output, result = self._queue.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.answers[one.request_id] += one.new_token_ids

    def _execute(self, output: Any) -> ModelRunnerOutput:
        results: list[ModelRunnerOutput | None] = self.run_workers(output)
        if len(results) == 1:
            assert results[0] is not None
            return results[0]
        merged = self._aggregator.aggregate(results)
        assert merged is not None
        return merged

    def run(self) -> None:
        """Until nothing is to be done."""
        for _ in range(100_000):
            if not self.scheduler.has_requests() and not self._queue:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def forget(self) -> None:
        """The engine's own cache is empty afterwards."""
        assert self.scheduler.reset_prefix_cache()

    # ---- FlexKV -----------------------------------------------------------------------------------------------

    @property
    def side(self) -> Any:
        connector = self.scheduler.connector
        for one in (connector, *getattr(connector, "_connectors", ())):
            if hasattr(one, "_flexkv_connector"):
                return one._flexkv_connector.scheduler
        raise AssertionError("no FlexKV")

    @property
    def manager(self) -> Any:
        return self.side._controller

    def wait_ready(self, num_slots: int) -> None:
        side, track = self.side, self.side._track

        def remember(request: Any) -> Any:
            self._tracked[request.request_id] = track(request)
            return self._tracked[request.request_id]

        side._track = remember
        until(lambda: self.manager.is_ready() and self.manager.stats()["num_slots"] >= num_slots, 20.0)

    def settle(self) -> None:
        manager = self.manager
        manager.wait(manager.tasks.unsettled(), 20.0, completely=True)
        names = ("blocks_being_fetched", "ssd_queued_blocks", "ssd_blocks_being_written")
        until(lambda: not any(manager.stats().get(name, 0) for name in names), 30.0)

    def wrong_blocks(self) -> tuple[int, int]:
        """How many blocks of all sequences seen are in the index, and how many of these are not what computing them
        writes. Nothing may be running."""
        self.settle()
        manager, checked, wrong = self.manager, {}, 0
        for name, (prompt, lora) in self.prompts.items():
            tokens = prompt + self.answers[name]
            if name not in self._tracked:                   # never considered
                continue
            keys = self._tracked[name].keys()[: len(tokens) // self.page_tokens]
            ready = manager.lookup(keys).num_ready
            new = [i for i in range(ready) if keys[i].tobytes() not in checked]
            if not new:
                continue
            truth = self.pages_of(tokens[: ready * self.page_tokens], lora)
            pages = np.arange(1, ready + 1, dtype=np.int32)
            assert ready < self.workers[0].caches[0].shape[0]
            task = manager.get_blocks(keys[:ready], 0, pages)
            result = manager.wait(task, 20.0, completely=True)[task]
            assert result.status.value == "success", result
            for i in new:
                good = all(
                    torch.equal(cache[i + 1], true[i])
                    for worker, pages_of_rank in zip(self.workers, truth, strict=True)
                    for cache, true in zip(worker.caches, pages_of_rank, strict=True)
                )
                checked[keys[i].tobytes()] = good
                wrong += not good
        return len(checked), wrong

    def close(self) -> None:
        for worker in self.workers:
            if worker.connector is not None:
                worker.connector.shutdown()
        if self.scheduler.connector is not None:
            self.scheduler.connector.shutdown()
        kv_transfer_state._KV_CONNECTOR_AGENT = None
