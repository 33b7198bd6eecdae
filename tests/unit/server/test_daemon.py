"""The daemon: the settings of its domains."""

from pathlib import Path

import pytest

from tests.support.daemon import engine, running


def test_gpudirect_storage_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Several engines use a cache, and a read from SSD must not reach the pages of another."""
    ssd = {"ssd_cache_gb": 1 / 1024, "ssd_cache_dir": str(tmp_path / "ssd"), "enable_gds": True}
    with running(tmp_path / "server", cache=ssd) as daemon:
        assert "enable_gds has no effect in the daemon" in caplog.text
        with engine(tmp_path / "server", tmp_path / "ranks"):
            [pool] = daemon._pools.values()
            assert pool.cache.listener._on_gds is None
