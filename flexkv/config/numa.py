"""NUMA nodes of the host tier."""

from flexkv.errors import ConfigError

_MAX_NODE = 1023


def read_numa_nodes(text: str) -> tuple[int, ...]:
    """Read the setting ``numa_nodes``: numbers separated by commas; ConfigError for any other text."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() and len(part) <= 4 and int(part) <= _MAX_NODE for part in parts):
        raise ConfigError("numa_nodes", text, f"must be numbers from 0 to {_MAX_NODE} separated by commas, such as 0,1")
    return tuple(map(int, parts))
