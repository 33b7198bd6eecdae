"""Descriptions of a framework's tensors as memory with strides."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from flexkv.errors import RegistrationError
from flexkv.rank.kv_layout import KVCacheLayout
from flexkv.rank.regions import TensorSpec

if TYPE_CHECKING:
    import torch


KVTensor = Union["np.ndarray[Any, Any]", "torch.Tensor"]
"""Memory that holds KV: a NumPy array, or a torch tensor on the CPU or on an NVIDIA GPU."""


def tensor_spec(tensor: KVTensor, page_dim: int = 0, tokens_per_page: int | None = None) -> TensorSpec:
    """Describe the memory of a tensor by its address and strides. The tensor must outlive the registration.

    Parameters
    ----------
    tensor : ndarray or torch.Tensor
        KV of one layer, of any shape and any dtype of fixed size. One dimension counts pages or token slots.
    page_dim : int
        The dimension that counts pages; negative values count from the last dimension.
    tokens_per_page : int, optional
        Number of token slots of a page, if ``page_dim`` counts token slots instead of pages.

    Returns
    -------
    TensorSpec

    Raises
    ------
    RegistrationError
        The tensor is neither a NumPy array nor a torch tensor, is read-only, is on another kind of device, or has no
        dimension ``page_dim``.
    """
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.hasobject or not tensor.flags.writeable:
            raise RegistrationError(
                f"an array of {tensor.dtype}, writeable = {tensor.flags.writeable}: KV needs a dtype of fixed size and "
                "memory that loads may write; register a copy (numpy.array)"
            )
        shape, steps, itemsize = tensor.shape, tensor.strides, tensor.itemsize
        if any(step % itemsize for step in steps):
            raise RegistrationError(
                f"an array with strides of {steps} bytes and elements of {itemsize}: register a contiguous array"
            )
        address, strides, device = tensor.ctypes.data, tuple(step // itemsize for step in steps), None
    elif hasattr(tensor, "data_ptr"):
        if tensor.device.type not in ("cpu", "cuda"):
            raise RegistrationError(f"a tensor on {tensor.device}: KV can be on the CPU or on an NVIDIA GPU")
        device = None if tensor.device.type == "cpu" else tensor.device.index
        address, shape, strides = tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
        itemsize = tensor.element_size()
    else:
        raise RegistrationError(f"a {type(tensor).__name__} cannot hold KV: register NumPy arrays or torch tensors")
    if not -len(shape) <= page_dim < len(shape):
        raise RegistrationError(f"page_dim = {page_dim} of a tensor of shape {shape}: it has {len(shape)} dimensions")
    return TensorSpec(address, shape, strides, itemsize, page_dim % len(shape), tokens_per_page, device)


def content_digest(specs: Sequence[TensorSpec]) -> bytes:
    """Digest of the layout of a block's bytes: the shapes and item sizes of its tensors and their kind of device.

    The order of K, V, heads and tokens depends on the engine's version and attention backend. Blocks of two layouts
    must not be exchanged, even if their domain and size are equal.

    Returns
    -------
    bytes
        16 bytes.
    """
    shapes = [
        (spec.shape[: spec.page_dim], spec.shape[spec.page_dim + 1 :], spec.tokens_per_page, spec.itemsize,
         spec.device is None)
        for spec in specs
    ]
    return hashlib.sha256(repr(shapes).encode()).digest()[:16]


def upstream_spec(spec: TensorSpec, layout: KVCacheLayout) -> TensorSpec:
    """The tensor with its ``tokens_per_page`` taken from the layout, if its first dimension counts token slots.

    Raises
    ------
    RegistrationError
        The first dimension counts neither the layout's pages nor its token slots.
    """
    rows, slots = spec.shape[0], layout.num_block * layout.tokens_per_block
    if rows not in (layout.num_block, slots):
        raise RegistrationError(
            f"a tensor of shape {spec.shape} has neither {layout.num_block} pages nor {slots} token slots in "
            "its first dimension"
        )
    return spec if rows == layout.num_block else replace(spec, tokens_per_page=layout.tokens_per_block)
