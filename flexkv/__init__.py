"""FlexKV: a KV-cache manager for LLM inference. Importing it loads neither torch nor CUDA."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv.config import CacheConfig as CacheConfig
    from flexkv.config import ModelConfig as ModelConfig
    from flexkv.kvmanager import KVManager as KVManager
    from flexkv.response import KVResponse as KVResponse
    from flexkv.response import KVResponseStatus as KVResponseStatus
    from flexkv.server.client import KVTPClient as KVTPClient
    from flexkv.server.tensors import tensor_spec as tensor_spec

__version__ = "0.1.0"

_PUBLIC = {
    "CacheConfig": "flexkv.config",
    "KVManager": "flexkv.kvmanager",
    "KVResponse": "flexkv.response",
    "KVResponseStatus": "flexkv.response",
    "KVTPClient": "flexkv.server.client",
    "ModelConfig": "flexkv.config",
    "tensor_spec": "flexkv.server.tensors",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'flexkv' has no attribute {name!r}")
