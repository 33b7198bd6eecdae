"""The domain: identity of everything that must be equal for KV to be the same."""

import json
import secrets

from flexkv.config.settings import CacheConfig, ModelConfig

LAYOUT_VERSION = 3
"""Version of the slot layout and of the keys. It must be raised whenever the same KV gets another layout or key."""


_CHANGED = b" changed "

_CONTENT = ("model_id", "revision", "weights_id", "config_digest")
"""Parts of a domain that change the bytes of KV, and not their layout."""


def domain(model: ModelConfig, cache: CacheConfig) -> bytes:
    """Domain of a model, the seed of its block keys: two deployments share KV only if their domains are equal.

    Equal settings give the same domain in every process and on every machine.
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


def layout_of(domain: str) -> str:
    """The part of a domain that determines the layout of a slot: models with equal ones can share slots. Their keys
    differ, so they share no KV."""
    try:
        identity = json.loads(domain)
    except (ValueError, RecursionError):
        return domain
    if not isinstance(identity, dict):
        return domain
    layout = {key: value for key, value in identity.items() if key not in _CONTENT}
    return json.dumps(layout, sort_keys=True, separators=(",", ":"))


def changed_domain(before: bytes) -> bytes:
    """Make a unique domain, for an engine whose weights were changed in place."""
    return before.partition(_CHANGED)[0] + _CHANGED + secrets.token_hex(16).encode()
