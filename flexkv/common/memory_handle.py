"""Upstream's path to the handles of tensors."""

from flexkv.rank.shared_tensor import TensorSharedHandle

__all__ = ["TensorSharedHandle"]
