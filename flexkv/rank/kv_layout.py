"""The layout of an engine's KV tensors, as upstream's adapters describe it."""

import enum
from dataclasses import dataclass

from flexkv.errors import RegistrationError


class KVCacheLayoutType(enum.Enum):
    """Order of the outer dimensions of an engine's KV cache."""

    LAYERFIRST = "LAYERFIRST"
    BLOCKFIRST = "BLOCKFIRST"


@dataclass(frozen=True)
class KVCacheLayout:
    """Description of an engine's KV cache (upstream's signature). The strides of the tensors decide; the number of
    pages or token slots is checked against their shape."""

    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    kv_dim: int = 2
    num_kv_heads: int = 1
    _kv_shape: tuple[int, ...] | None = None
    layer_groups: object = None
    tp_size: int = 1
    is_mla: bool | None = None

    def __post_init__(self) -> None:
        for name in ("num_layer", "num_block", "tokens_per_block", "num_head", "head_size"):
            if getattr(self, name) < 1:
                raise RegistrationError(f"KVCacheLayout.{name} is {getattr(self, name)}; it must be at least 1")
