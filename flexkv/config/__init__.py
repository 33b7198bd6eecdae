"""Every setting of the package. Parsed once, checked, frozen, passed down; nothing else reads the environment."""

from flexkv.config.domain import domain
from flexkv.config.settings import CacheConfig, ConnectorConfig, FlexKVConfig, ModelConfig, TransferConfig
from flexkv.config.sources import cache_directory, load_config, process_environment, runtime_directory

__all__ = [
    "CacheConfig",
    "ConnectorConfig",
    "FlexKVConfig",
    "ModelConfig",
    "TransferConfig",
    "cache_directory",
    "domain",
    "load_config",
    "process_environment",
    "runtime_directory",
]
