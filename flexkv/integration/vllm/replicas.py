"""KV that is equal on several ranks of a pipeline stage: it is stored once."""

from typing import TYPE_CHECKING

from flexkv.integration.vllm.context_parallel import num_shares

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def copy_name(vllm_config: "VllmConfig", tp_rank: int, share: int = 0) -> str | None:
    """Name of the copy that a tensor-parallel rank shares with others; None: its KV is its own.

    With MLA the KV of all ranks is equal. With more ranks than KV heads, vLLM gives neighbouring ranks the same head.
    With decode context parallelism, ranks have equal KV only if they also store the same ``share`` of the tokens. None
    too if layers of the model, or of its draft, may have other heads than the model's configuration says.
    """
    model, ranks = vllm_config.model_config, int(vllm_config.parallel_config.tensor_parallel_size)
    heads = 1 if model.use_mla else int(model.get_total_num_kv_heads())
    shares = num_shares(vllm_config)
    if _may_have_other_heads(vllm_config, heads) or heads >= ranks or ranks % heads or ranks // heads <= shares:
        return None
    name = "all ranks" if model.use_mla else f"head {tp_rank // (ranks // heads)}"
    return name if shares == 1 else f"{name}, share {share}"


def _may_have_other_heads(vllm_config: "VllmConfig", heads: int) -> bool:
    """Whether layers may have another number of KV heads than ``heads``, or may be of another kind."""
    model, draft = vllm_config.model_config, getattr(
        getattr(vllm_config, "speculative_config", None), "draft_model_config", None
    )
    text = getattr(model, "hf_text_config", None)
    if hasattr(text, "block_configs") or isinstance(getattr(text, "num_key_value_heads", None), list | tuple | dict):
        return True                                  # each layer has a number of its own
    if draft is None or draft is model:
        return False
    if model.use_mla or draft.use_mla:
        return bool(model.use_mla != draft.use_mla)
    return int(draft.get_total_num_kv_heads()) != heads
