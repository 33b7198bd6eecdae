"""Allow-list of the engines that the adapter supports. For every other engine caching is off."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

from flexkv.integration.vllm.context_parallel import unsupported_context

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV_DTYPES = frozenset({
    "auto", "float16", "bfloat16", "float32",
    "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4", "nvfp4_4over6", "nvfp4_ds_mla",
    "int4_per_token_head", "int8_per_token_head", "fp8_per_token_head",
    "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc", "ultraquant_4bit",
})
"""KV cache dtypes of vLLM 0.32. Their scales are constants of the weights, or are stored in the pages."""

LAYER_KINDS = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
"""Supported kinds of vLLM's KV layers: their pages keep all tokens of a sequence, and full pages never change."""


def unsupported(vllm_config: "VllmConfig") -> str | None:
    """The reason why the adapter does not support an engine; None: it does.

    Never raises. Both halves of the connector call it, and get the same result from the same configuration.
    """
    for check in _CHECKS:
        try:
            reason = check(vllm_config)
        except Exception as error:      # a property of vLLM's may raise anything  # noqa: BLE001
            reason = f"the engine's configuration cannot be read ({type(error).__name__}: {error})"
        if reason:
            return reason
    return None


def unsupported_layers(kv_cache_config: Any, block_size: int, shares: int = 1) -> str | None:
    """The reason why the adapter does not support the groups of a KV cache (vLLM's ``KVCacheConfig``); None: it does.
    ``shares``: ranks that store different tokens of the same sequence."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups; FlexKV supports one"
    spec = groups[0].kv_cache_spec
    layers = list(getattr(spec, "kv_cache_specs", {"": spec}).values())
    for layer in layers:
        kind = type(layer).__name__
        if kind not in LAYER_KINDS:
            return f"the model has KV layers of kind {kind}; FlexKV supports {', '.join(sorted(LAYER_KINDS))}"
        if getattr(layer, "non_causal", False):
            return "the model has layers that attend to later tokens, so KV of a prefix depends on the tokens after it"
        if shares > 1 and not getattr(layer, "dcp_sharded", True):
            return f"decode_context_parallel_size is {shares}, and some layers store all tokens on each rank"
    if spec.block_size != block_size:
        return f"a KV page holds {spec.block_size} tokens, and the engine's block size is {block_size}"
    return None


def unsupported_tensors(kv_caches: "Mapping[str, torch.Tensor]", kv_cache_config: Any) -> str | None:
    """The reason why the adapter does not support these tensors, given by layer; None: they contain every byte of each
    page."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor):
            return f"the KV of layer {name} is a {type(tensor).__name__}, not a tensor"
        layer = getattr(spec, "kv_cache_specs", {}).get(name, spec)
        page_bytes = getattr(layer, "unpadded_page_size_bytes", None) or getattr(layer, "real_page_size_bytes", 0)
        if tensor.numel() * tensor.element_size() < kv_cache_config.num_blocks * page_bytes:
            return (
                f"a page of layer {name} has {page_bytes} bytes, and a tensor of shape {tuple(tensor.shape)} shows "
                "fewer: scales or values lie outside of it"
            )
    return None


def find_kv_cache_config(owner: object) -> Any:
    """The ``KVCacheConfig`` that vLLM passed to the connector that wraps ``owner``; None: it passed none."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    group = get_kv_transfer_group()
    for connector in (group, *getattr(group, "_connectors", ())):
        if getattr(connector, "_flexkv_connector", None) is owner:
            return getattr(connector, "_kv_cache_config", None)
    return None


def _platform(vllm_config: "VllmConfig") -> str | None:
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return f"FlexKV supports CUDA and CPU, this platform is {current_platform.device_name}"
    return None


def _model_kind(vllm_config: "VllmConfig") -> str | None:
    model = vllm_config.model_config
    kinds = {
        "is_attention_free": "has no attention", "is_hybrid": "has recurrent layers",
        "is_encoder_decoder": "is an encoder-decoder", "is_diffusion": "denoises tokens that it has computed before",
        "has_inner_state": "keeps a state beside its KV", "rswa_window": "drops KV inside a sequence",
    }
    for name, words in kinds.items():
        if getattr(model, name, False):
            return f"the model {words}"
    if (kind := getattr(model, "attn_type", "decoder")) != "decoder":
        return f"the model's attention is {kind}; FlexKV supports decoder"
    if getattr(model, "runner_type", "generate") == "pooling" and not model.is_prefix_caching_supported:
        return "the model pools over all of its tokens, so none of them can be loaded"
    if getattr(getattr(model, "multimodal_config", None), "mm_encoder_only", False):
        return "the engine runs an encoder only"
    return None


def _attention(vllm_config: "VllmConfig") -> str | None:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if window := getattr(cache, "sliding_window", None):
        return f"all layers have a sliding window ({window} tokens), and vLLM gives pages outside of it to others"
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    if model.use_mla and current_platform.is_cpu() and (
        not torch.cpu._is_amx_tile_supported() or getattr(backend, "name", backend) == "CPU_MLA"
    ):
        return "vLLM's MLA on a CPU without AMX ignores KV that was loaded"
    if getattr(getattr(vllm_config, "attention_config", None), "hisparse_config", None) is not None:
        return "HiSparse keeps a part of the KV in memory of its own"
    return None


def _cache(vllm_config: "VllmConfig") -> str | None:
    cache = vllm_config.cache_config
    if cache.cache_dtype not in KV_DTYPES:
        return f"the KV cache dtype {cache.cache_dtype} is not known; FlexKV supports {', '.join(sorted(KV_DTYPES))}"
    if getattr(cache, "kv_sharing_fast_prefill", False):
        return "kv_sharing_fast_prefill leaves KV of prompts incomplete"
    if not isinstance(cache.block_size, int) or cache.block_size < 1:
        return f"the engine's block size is {cache.block_size}"
    return None


_CHECKS: tuple[Callable[["VllmConfig"], str | None], ...] = (
    _platform, _model_kind, _attention, _cache, unsupported_context
)
