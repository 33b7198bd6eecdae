"""Upstream's path to the layouts."""

from flexkv.rank.kv_layout import KVCacheLayout, KVCacheLayoutType

__all__ = ["KVCacheLayout", "KVCacheLayoutType"]
