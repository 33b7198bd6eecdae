"""The setting of NUMA nodes."""

import pytest

from flexkv.config.numa import read_numa_nodes
from flexkv.errors import ConfigError


@pytest.mark.parametrize(("text", "nodes"), [
    ("", ()), (" ", ()), ("0", (0,)), ("0, 1", (0, 1)), ("3,1023,3", (3, 1023, 3)),
])
def test_numbers_are_read(text: str, nodes: tuple[int, ...]) -> None:
    assert read_numa_nodes(text) == nodes


@pytest.mark.parametrize("text", ["0-1", "a", "0,", ",", "-1", "1024", "9" * 5000, "\u00b2", "1 2"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="numa_nodes"):
        read_numa_nodes(text)
