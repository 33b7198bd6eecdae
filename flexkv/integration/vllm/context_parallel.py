"""Decode context parallelism (DCP): each rank of a DCP group stores its share of the tokens of a sequence.

vLLM's scheduler counts in pages of ``block_size`` tokens for each rank of the group. The page with one id contains a
different share on each rank. Decisions and their reasons: docs/design/0019-segments.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def num_shares(vllm_config: "VllmConfig") -> int:
    """Number of ranks that the tokens of a sequence are distributed over; 1: every rank stores all tokens."""
    return int(getattr(vllm_config.parallel_config, "decode_context_parallel_size", 1))


def page_tokens(vllm_config: "VllmConfig") -> int:
    """Tokens that a page of vLLM's scheduler stands for: the unit of keys, lookups and offers."""
    return int(vllm_config.cache_config.block_size) * num_shares(vllm_config)


def share_of_rank(vllm_config: "VllmConfig") -> int:
    """Index of the share that this worker's rank stores."""
    if num_shares(vllm_config) == 1:
        return 0
    from vllm.distributed.parallel_state import get_dcp_group

    return int(get_dcp_group().rank_in_group)


def interleave_size(vllm_config: "VllmConfig") -> int:
    """Number of consecutive tokens that go to one share before the next share follows.

    vLLM lets the older ``dcp_kv_cache_interleave_size`` override the setting, in the workers only.
    """
    parallel = vllm_config.parallel_config
    older = int(getattr(parallel, "dcp_kv_cache_interleave_size", 1))
    return older if older > 1 else int(getattr(parallel, "cp_kv_cache_interleave_size", 1))


def layout_name(vllm_config: "VllmConfig") -> str:
    """Name of the layout of tokens in pages, for the domain; empty without DCP."""
    shares = num_shares(vllm_config)
    return f"dcp {shares} interleave {interleave_size(vllm_config)}" if shares > 1 else ""


def unsupported_context(vllm_config: "VllmConfig") -> str | None:
    """The reason why the adapter does not support the engine's context parallelism; None: it does."""
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
    if (size := getattr(parallel, "prefill_context_parallel_size", 1)) != 1:
        return (f"prefill_context_parallel_size is {size}: it adds ranks to each tensor-parallel rank, and versions of "
                "vLLM distribute KV over them in different ways; FlexKV supports 1")
    shares, ranks = num_shares(vllm_config), int(parallel.tensor_parallel_size)
    if shares == 1:
        return None
    this = f"decode_context_parallel_size is {shares}"
    if shares < 1 or ranks % shares:
        return f"{this}: FlexKV supports divisors of tensor_parallel_size, which is {ranks}"
    if not model.use_mla:
        heads = int(model.get_total_num_kv_heads())
        if ranks % heads or ranks // heads % shares:
            return f"{this}: with {heads} KV heads on {ranks} tensor-parallel ranks, a group of them has no common head"
    interleave = interleave_size(vllm_config)
    if interleave < 1 or cache.block_size % interleave:
        return (f"cp_kv_cache_interleave_size is {interleave}: FlexKV supports divisors of the block size, which is "
                f"{cache.block_size}")
    has_connector = getattr(vllm_config.kv_transfer_config, "has_connector", lambda name: False)
    if has_connector("NixlConnector"):
        return f"{this}, and NixlConnector changes cp_kv_cache_interleave_size in the workers; use one of the two"
    return None
