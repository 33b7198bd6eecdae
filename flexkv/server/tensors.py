"""Tensors of a framework, as memory with strides."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flexkv._core.block_table import TensorSpec
from flexkv.errors import RegistrationError
from flexkv.storage.layout import KVCacheLayout

if TYPE_CHECKING:
    import torch


def tensor_spec(tensor: "torch.Tensor", page_dim: int = 0, tokens_per_page: int | None = None) -> TensorSpec:
    """Describe a tensor, in this process's memory or on a GPU, by its own address and strides."""
    if tensor.device.type not in ("cpu", "cuda"):
        raise RegistrationError(f"a tensor on {tensor.device}: KV can be on the CPU or on an NVIDIA GPU")
    device = None if tensor.device.type == "cpu" else tensor.device.index
    return TensorSpec(
        tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size(), page_dim,
        tokens_per_page, device,
    )


def content_digest(specs: Sequence[TensorSpec]) -> bytes:
    """16 bytes that say what the bytes of a block mean: which tensors, of which shapes, on what kind of device.

    Engines arrange K, V, heads and tokens as version and backend like; the same bytes of two arrangements are not the
    same KV, though all else be equal.
    """
    shapes = [
        (spec.shape[: spec.page_dim], spec.shape[spec.page_dim + 1 :], spec.tokens_per_page, spec.itemsize,
         spec.device is None)
        for spec in specs
    ]
    return hashlib.sha256(repr(shapes).encode()).digest()[:16]


def upstream_spec(spec: TensorSpec, layout: KVCacheLayout) -> TensorSpec:
    """A tensor whose first dimension counts the layout's pages, or its token slots."""
    rows, slots = spec.shape[0], layout.num_block * layout.tokens_per_block
    if rows not in (layout.num_block, slots):
        raise RegistrationError(
            f"a tensor of shape {spec.shape} has neither {layout.num_block} pages nor {slots} token slots in "
            "its first dimension"
        )
    return spec if rows == layout.num_block else replace(spec, tokens_per_page=layout.tokens_per_block)
