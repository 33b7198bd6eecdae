"""FlexKV: a KV-cache manager for LLM inference. Importing it loads neither torch nor CUDA."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv.config import CacheConfig as CacheConfig
    from flexkv.config import ModelConfig as ModelConfig
    from flexkv.controller.response import KVResponse as KVResponse
    from flexkv.controller.response import KVResponseStatus as KVResponseStatus
    from flexkv.kvmanager import KVManager as KVManager
    from flexkv.rank.tensors import tensor_spec as tensor_spec
    from flexkv.rank.tp_client import KVTPClient as KVTPClient

__version__ = "0.1.0"

_PUBLIC = {
    "CacheConfig": "flexkv.config",
    "KVManager": "flexkv.kvmanager",
    "KVResponse": "flexkv.controller.response",
    "KVResponseStatus": "flexkv.controller.response",
    "KVTPClient": "flexkv.rank.tp_client",
    "ModelConfig": "flexkv.config",
    "tensor_spec": "flexkv.rank.tensors",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'flexkv' has no attribute {name!r}")
