"""Upstream's path to the handles of tensors."""

from flexkv.server.shared_tensor import TensorSharedHandle

__all__ = ["TensorSharedHandle"]
