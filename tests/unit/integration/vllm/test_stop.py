"""The warning that vLLM stops sooner than queued blocks can be written to SSD."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.config import CacheConfig
from flexkv.integration.vllm.stop import warn_of_short_stop

SSD = CacheConfig(cpu_cache_gb=0.1, ssd_cache_gb=1)


@pytest.mark.parametrize(
    ("vllm_config", "cache", "is_warned"),
    [
        (SimpleNamespace(shutdown_timeout=0), SSD, True),
        (SimpleNamespace(shutdown_timeout=29), SSD, True),
        (SimpleNamespace(shutdown_timeout=30), SSD, False),
        (SimpleNamespace(shutdown_timeout=0), CacheConfig(cpu_cache_gb=0.1), False),
        (SimpleNamespace(), SSD, False),
    ],
)
def test_a_stop_that_is_too_short_is_warned_of(
    vllm_config: Any, cache: CacheConfig, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_short_stop(vllm_config, cache)
    assert ("--shutdown-timeout 60" in caplog.text) == is_warned


def test_vllm_has_the_option() -> None:
    config = pytest.importorskip("vllm.config")
    assert "shutdown_timeout" in config.VllmConfig.__dataclass_fields__
