"""All settings of the package: parsed once, checked, frozen and passed down. No other package reads the environment."""

from flexkv.config.directories import cache_directory, runtime_directory
from flexkv.config.domain import changed_domain, domain, layout_of
from flexkv.config.effects import warn_overruled
from flexkv.config.paths import register_port
from flexkv.config.settings import CacheConfig, ConnectorConfig, FlexKVConfig, ModelConfig, TransferConfig
from flexkv.config.sources import engine_config, load_config, process_environment
from flexkv.config.weights import weights_id

__all__ = [
    "CacheConfig",
    "ConnectorConfig",
    "FlexKVConfig",
    "ModelConfig",
    "TransferConfig",
    "cache_directory",
    "changed_domain",
    "domain",
    "engine_config",
    "layout_of",
    "load_config",
    "process_environment",
    "register_port",
    "runtime_directory",
    "warn_overruled",
    "weights_id",
]
