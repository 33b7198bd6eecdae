"""Upstream's path to the layouts."""

from flexkv.storage.layout import KVCacheLayout, KVCacheLayoutType

__all__ = ["KVCacheLayout", "KVCacheLayoutType"]
