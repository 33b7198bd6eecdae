"""As much of vLLM's configuration and requests as the adapter reads, for tests that start no engine."""

from types import SimpleNamespace
from typing import Any


def vllm_config(port: str = "", *, role: str = "kv_both", rank: int = 0, **changes: Any) -> Any:
    """A configuration of a small model. ``changes``: attributes by ``section__name``; ``settings``: of FlexKV."""
    settings = {"num_cpu_blocks": 64, "layerwise_loads": "never", **changes.pop("settings", {})}
    if port:
        settings["gpu_register_port"] = port
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            engine_id=f"e_dp{rank}", kv_connector_extra_config=settings, kv_role=role,
            is_kv_producer=role in ("kv_producer", "kv_both"), is_kv_consumer=role in ("kv_consumer", "kv_both"),
        ),
        cache_config=SimpleNamespace(block_size=4, cache_dtype="auto", num_gpu_blocks=64),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_index=rank,
            decode_context_parallel_size=1, prefill_context_parallel_size=1, cp_kv_cache_interleave_size=1,
        ),
        model_config=SimpleNamespace(
            dtype="torch.bfloat16", get_num_layers=lambda parallel: 1, get_total_num_kv_heads=lambda: 1,
            get_head_size=lambda: 64, use_mla=False, model="m", revision=None,
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False)),
        attention_config=SimpleNamespace(backend=None),
    )
    for name, value in changes.items():
        section, attribute = name.split("__")
        setattr(getattr(config, section), attribute, value)
    return config


def request(name: str, tokens: list[int], **changes: Any) -> Any:
    """A request for tests of the scheduler's half."""
    fields = {
        "request_id": name, "lora_request": None, "cache_salt": None, "prompt_embeds": None, "mm_features": [],
        "prompt_token_ids": tokens, "all_token_ids": tokens, "num_tokens": len(tokens),
        "num_prompt_tokens": len(tokens), "num_computed_tokens": len(tokens), "status": None,
        "skip_reading_prefix_cache": False, "resumable": False,
    }
    return SimpleNamespace(**(fields | changes))


def step(scheduled: dict[str, int]) -> Any:
    """A step of vLLM's scheduler in which new requests compute so many tokens each."""
    return SimpleNamespace(
        num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values()), preempted_req_ids=(),
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in scheduled],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
        ),
        finished_req_ids=set(),
    )
