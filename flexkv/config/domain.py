"""Identity of what makes KV bytes comparable."""

import json
import secrets

from flexkv.config.settings import CacheConfig, ModelConfig

LAYOUT_VERSION = 3
"""Version of the bytes in a slot and of the keys; raised whenever the same KV gets another layout or another key."""


_CHANGED = b" changed "


def domain(model: ModelConfig, cache: CacheConfig) -> bytes:
    """What the keys of a model's blocks are seeded with: two deployments share KV only if all of it is equal.

    The same in every process and on every machine.
    """
    identity = {
        "model_id": model.model_id,
        "revision": model.revision,
        "weights_id": model.weights_id,
        "config_digest": model.config_digest,
        "engine": model.engine,
        "dtype": model.dtype,
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_size": model.head_size,
        "use_mla": model.use_mla,
        "tp_size": model.tp_size,
        "pp_size": model.pp_size,
        "tokens_per_block": cache.tokens_per_block,
        "layout": LAYOUT_VERSION,
    }
    return json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()


def changed_domain(before: bytes) -> bytes:
    """A domain that no other process has, for an engine whose weights were changed in place."""
    return before.partition(_CHANGED)[0] + _CHANGED + secrets.token_hex(16).encode()
