"""Identity of a vLLM engine's KV: its weights, and the configuration that affects their KV.

Decisions and their reasons: docs/design/0014-identity.md.
"""

import hashlib
import importlib.util
import json
import secrets
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

from flexkv.config.weights import WeightsIdentity, model_identity
from flexkv.errors import IdentityError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FILE_FORMATS = frozenset({
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "mistral", "sharded_state",
    "runai_streamer", "runai_streamer_sharded", "gguf", "bitsandbytes",
})
"""Load formats whose weights are files in the model's directory (vLLM 0.32). Other formats use other sources."""

_VOLATILE = frozenset({"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "torch_dtype"})
_SECTIONS = ("model_config", "cache_config", "parallel_config", "attention_config", "engram_config", "offload_config")
"""Parts of vLLM's configuration whose ``compute_hash`` is part of the digest."""

_SLACK_NS = 100_000_000
"""Tolerance for the clock of file systems, in nanoseconds. No engine reads weights that soon after its start."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of this engine's KV.

    Attributes
    ----------
    weights_id, config_digest : str
        See ``ModelConfig``.
    unknown : str
        Reason why KV must not outlive the engine, whose identity is then unique; empty: KV may outlive the engine.
    """

    weights_id: str
    config_digest: str
    unknown: str = ""


def identify(vllm_config: "VllmConfig") -> Identity:
    """Determine the identity of an engine's KV. Never raises. Of the weights, only samples are read."""
    known, unknown = ["", ""], []
    for i, part in enumerate((_weights, config_digest)):
        try:
            known[i] = part(vllm_config)
        except IdentityError as error:
            unknown.append(str(error))
        except Exception as error:      # vLLM's properties may raise anything  # noqa: BLE001
            unknown.append(f"the engine's configuration cannot be read ({type(error).__name__}: {error})")
    if not unknown and (reason := _changes_at_run_time(vllm_config)):
        unknown.append(reason)
    if unknown:
        known[0] += f" engine {secrets.token_hex(16)}"
    return Identity(known[0], known[1], "; ".join(unknown))


def process_started_ns() -> int:
    """Start time of this process, in ns since 1970."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19])                             # starttime, in 1/100 s since boot (proc(5))
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10_000_000
    return time.time_ns() - age_ns


def _weights(vllm_config: "VllmConfig") -> str:
    model = vllm_config.model_config
    load_format = str(vllm_config.load_config.load_format).lower()
    if load_format == "dummy":
        return f"dummy {model.seed}"
    if load_format not in FILE_FORMATS:
        raise IdentityError(f"load_format {load_format} does not load weights from files")
    names = [(model.model_weights or model.model, model.revision)]
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft.model != model.model:
        names.append((draft.model, draft.revision))
    found = [_identity_of(name, revision, vllm_config.load_config.download_dir) for name, revision in names]
    if max(weights.changed_ns for weights in found) > process_started_ns() + _SLACK_NS:
        raise IdentityError("weight files were changed after this process started, possibly after they were loaded")
    return " ".join(weights.digest for weights in found)


def _identity_of(name: str, revision: str | None, download_dir: str | None) -> WeightsIdentity:
    path = Path(name)
    if not path.exists():
        path = snapshot(name, revision, download_dir)
    return model_identity(path)


def snapshot(name: str, revision: str | None, download_dir: str | None = None) -> Path:
    """Directory of a hub model's snapshot in the Hugging Face cache. IdentityError: the cache has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for directory in dict.fromkeys((download_dir, None)):
            for file in ("config.json", "params.json", "adapter_config.json"):
                found = try_to_load_from_cache(name, file, cache_dir=directory, revision=revision)
                if isinstance(found, str):
                    return Path(found).parent
    except HFValidationError:
        pass
    raise IdentityError(f"the weights of {name} are neither local files nor a snapshot in the Hugging Face cache")


def _changes_at_run_time(vllm_config: "VllmConfig") -> str:
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "with enable_sleep_mode, weights may be reloaded while the engine runs"
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        return "with weight_transfer_config, weights are changed while the engine runs"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "with calculate_kv_scales, the scales of KV are computed from the first batch"
    return ""


def config_digest(vllm_config: "VllmConfig") -> str:
    """Digest of all effective settings that change the KV of given weights and tokens, or its layout in memory."""
    model, cache, load = vllm_config.model_config, vllm_config.cache_config, vllm_config.load_config
    lora = getattr(vllm_config, "lora_config", None)
    speculative = getattr(vllm_config, "speculative_config", None)
    multimodal = getattr(model, "multimodal_config", None)
    parts: dict[str, Any] = {
        "hf": canonical(model.hf_config.to_dict()),
        "hf_text": canonical(model.hf_text_config.to_dict()),
        "rope": canonical(getattr(model.hf_text_config, "rope_parameters", None)),
        "max_model_len": model.max_model_len,
        "quantization": str(model.quantization),
        "quantization_config": canonical(getattr(model, "quantization_config", None)),
        "load": [str(load.load_format), canonical(load.model_loader_extra_config)],
        "dtype": str(model.dtype),
        "kv": [str(cache.cache_dtype), canonical(getattr(cache, "kv_cache_dtype_skip_layers", None)),
               str(getattr(cache, "kv_cache_layout", None)), _from_environment("VLLM_KV_CACHE_LAYOUT")],
        "lora": str(getattr(lora, "lora_dtype", None)),
        "speculative": [str(getattr(speculative, name, None)) for name in ("method", "num_speculative_tokens")],
        "multimodal": canonical({name: getattr(multimodal, name, None) for name in
                                 ("mm_processor_kwargs", "video_pruning_rate", "mm_encoder_attn_dtype")}),
        "hashes": {name: section.compute_hash() for name in _SECTIONS
                   if (section := getattr(vllm_config, name, None)) is not None},
        "additional": canonical(getattr(vllm_config, "additional_config", None)),
        "processor": _processor(),
        "flashinfer": importlib.util.find_spec("flashinfer") is not None,    # if installed, vLLM may use its attention
        "partition": _from_environment("VLLM_PP_LAYER_PARTITION"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def canonical(value: Any) -> Any:
    """Convert a value to JSON types, with the same result in every process. Names and versions that do not change KV
    are left out."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, dict):
        return {str(key): canonical(entry) for key, entry in value.items() if key not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [canonical(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(canonical(entry), sort_keys=True) for entry in value)
    if hasattr(value, "to_dict"):
        return canonical(value.to_dict())
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.dtype | Path | Enum):
        return [kind, str(value)]
    if hasattr(value, "__dict__"):
        return [kind, canonical(vars(value))]
    return [kind, value.__qualname__ if callable(value) else canonical(getattr(value, "__slots__", None))]


def _from_environment(name: str) -> str:
    from vllm import envs

    return str(getattr(envs, name, None))


def _processor() -> str:
    """Name of the GPU, or instruction set of the CPU. vLLM selects kernels by it, which decide the layout of KV."""
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    return f"{torch.backends.cpu.get_cpu_capability()} amx {torch.cpu._is_amx_tile_supported()}"
