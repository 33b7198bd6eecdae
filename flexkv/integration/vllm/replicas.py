"""KV that is equal on several ranks of a pipeline stage: it is stored once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def copy_name(vllm_config: "VllmConfig", tp_rank: int) -> str | None:
    """Name of the copy that a tensor-parallel rank shares with others; None: its KV is its own.

    With MLA the KV of all ranks is equal. With more ranks than KV heads, vLLM gives neighbouring ranks the same head.
    """
    model, ranks = vllm_config.model_config, int(vllm_config.parallel_config.tensor_parallel_size)
    if ranks == 1:
        return None
    if model.use_mla:
        return "all ranks"
    heads = int(model.get_total_num_kv_heads())
    if heads >= ranks or ranks % heads:
        return None
    return f"head {tp_rank // (ranks // heads)}"
