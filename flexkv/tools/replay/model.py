"""KV bytes per token and prefill speed of well-known models."""

from dataclasses import dataclass

from flexkv.config import ModelConfig
from flexkv.errors import ConfigError

_PEAK_FLOPS = 989e12
"""Dense bf16 operations per second of an H100 SXM: https://www.nvidia.com/en-us/data-center/h100/ (1,979e12 is with
sparsity)."""

_UTILIZATION = 0.5
"""Estimated share of the peak that prefill reaches. vLLM 0.23 on an H200, which has the same peak, prefilled
Llama-3.1-8B at 32,000 tokens/s (docs/performance.md), a share of 0.52."""


@dataclass(frozen=True, slots=True)
class Model:
    """Properties of a model that replay uses.

    Attributes
    ----------
    kv_bytes_per_token : int
        Total of all ranks.
    prefill_tokens_per_s : float
        Estimate for one GPU of the H100's class; n GPUs are up to n times as fast. 0: unknown.
    """

    kv_bytes_per_token: int
    prefill_tokens_per_s: float


def _model(layers: int, kv_heads: int, head_size: int, active_billions: float, use_mla: bool = False) -> Model:
    """Model with bf16 KV. Prefill takes 2 operations a token for each active parameter; attention is not counted."""
    config = ModelConfig(num_layers=layers, num_kv_heads=kv_heads, head_size=head_size, use_mla=use_mla)
    return Model(config.kv_bytes_per_token, round(_UTILIZATION * _PEAK_FLOPS / (2e9 * active_billions)))


MODELS = {
    "llama-3.1-8b": _model(32, 8, 128, 8.03),
    "llama-3.1-70b": _model(80, 8, 128, 70.6),
    "llama-3.3-70b": _model(80, 8, 128, 70.6),
    "llama-3.1-405b": _model(126, 8, 128, 406.0),
    "mistral-7b-v0.3": _model(32, 8, 128, 7.25),
    "qwen2.5-7b": _model(28, 4, 128, 7.62),
    "qwen2.5-32b": _model(64, 8, 128, 32.8),
    "qwen2.5-72b": _model(80, 8, 128, 72.7),
    "qwen3-8b": _model(36, 8, 128, 8.19),
    "qwen3-32b": _model(64, 8, 128, 32.8),
    "qwen3-30b-a3b": _model(48, 4, 128, 3.3),
    "qwen3-235b-a22b": _model(94, 4, 128, 22.0),
    "deepseek-v3": _model(61, 1, 576, 37.0, use_mla=True),
    "deepseek-r1": _model(61, 1, 576, 37.0, use_mla=True),
}
"""Known models by name. Layers, KV heads and head size are ``num_hidden_layers``, ``num_key_value_heads`` and
``head_dim`` of each model's ``config.json`` on huggingface.co (MLA: ``kv_lora_rank`` + ``qk_rope_head_dim``); active
parameters are from its model card. The numbers were written from memory and not checked against those files."""


def find_model(name: str) -> Model:
    """Find a model by its name, with or without its organisation; case is ignored.

    Raises
    ------
    ConfigError
        The model is not in ``MODELS``.
    """
    short = name.lower().rsplit("/", 1)[-1].removeprefix("meta-").removesuffix("-instruct")
    if short not in MODELS:
        raise ConfigError(
            "--model", name, f"is not one of {', '.join(MODELS)}: give --kv-bytes-per-token and --prefill-tokens-per-s"
        )
    return MODELS[short]
