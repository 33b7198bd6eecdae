"""Upstream's path to the settings."""

from flexkv.config import CacheConfig, ModelConfig

__all__ = ["CacheConfig", "ModelConfig"]
