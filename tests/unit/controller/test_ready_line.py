"""The line that the log gets when a manager is ready: all that is in effect."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv import KVManager, KVTPClient
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from tests.support.harness import until


@pytest.fixture
def ready_lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "flexkv")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("ready")]


def start(tmp_path: Path, ready_lines: Any, ranks: int = 1, note: str = "", **settings: Any) -> list[str]:
    port = str(tmp_path / "s")
    cache = CacheConfig(tokens_per_block=4, num_cpu_blocks=8, **settings)
    transfer = TransferConfig()
    with KVManager(ModelConfig(tp_size=ranks), cache, gpu_register_port=port, transfer_config=transfer, note=note) as m:
        clients = [KVTPClient(port, intra_client_id=rank, transfer_config=transfer) for rank in range(ranks)]
        for client in clients:
            client.register_tensors([np.zeros((8, 4, 1024), dtype=np.int16)])
        m.wait_ready(20.0)
        until(lambda: bool(ready_lines()))
        m.wait(m.put_async(range(4), range(4)))
    for client in clients:
        client.close()
    return ready_lines()


def test_host_memory_alone(tmp_path: Path, ready_lines: Any) -> None:
    assert start(tmp_path, ready_lines, ranks=2, eviction_policy="lru") == [
        "ready: host 0.000122 GiB (8 blocks of 4 tokens, 0.0156 MiB each); no SSD; 2 ranks; eviction lru; no metrics"
    ]


def test_ssd_metrics_and_a_note(tmp_path: Path, ready_lines: Any) -> None:
    for found in (0, 1):                                    # the second start finds what the first has written
        line = start(tmp_path, ready_lines, note="kv_both", ssd_cache_gb=0.001, ssd_cache_dir=str(tmp_path / "ssd"),
                     enable_metrics=True, py_metrics_port=0)[-1]
        assert "; SSD 0.001 GiB (" in line
        assert f" blocks, {found} found); 1 rank; eviction adaptive; metrics at http://127.0.0.1:" in line
        assert line.endswith("/metrics; kv_both")
    assert len(ready_lines()) == 2


def test_an_ssd_tier_that_cannot_be_opened(tmp_path: Path, ready_lines: Any) -> None:
    (tmp_path / "ssd").touch()
    (line,) = start(tmp_path, ready_lines, ssd_cache_gb=0.001, ssd_cache_dir=str(tmp_path / "ssd"))
    assert "; SSD not in service; " in line
