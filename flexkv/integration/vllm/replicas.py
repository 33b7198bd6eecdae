"""KV that is equal on several ranks of a pipeline stage: it is stored once."""

from typing import TYPE_CHECKING

from flexkv.integration.vllm.context_parallel import num_shares

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def copy_name(vllm_config: "VllmConfig", tp_rank: int, share: int = 0) -> str | None:
    """Name of the copy that a tensor-parallel rank shares with others; None: its KV is its own.

    With MLA the KV of all ranks is equal. With more ranks than KV heads, vLLM gives neighbouring ranks the same head.
    With decode context parallelism, ranks have equal KV only if they also store the same ``share`` of the tokens.
    """
    model, ranks = vllm_config.model_config, int(vllm_config.parallel_config.tensor_parallel_size)
    heads = 1 if model.use_mla else int(model.get_total_num_kv_heads())
    shares = num_shares(vllm_config)
    if heads >= ranks or ranks % heads or ranks // heads <= shares:
        return None
    name = "all ranks" if model.use_mla else f"head {tp_rank // (ranks // heads)}"
    return name if shares == 1 else f"{name}, share {share}"
