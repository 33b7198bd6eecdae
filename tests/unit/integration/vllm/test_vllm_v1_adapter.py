"""The connector's halves are made as vLLM's configuration says: role, data-parallel rank, settings."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from types import SimpleNamespace

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv import KVTPClient
from flexkv.config import TransferConfig
from flexkv.errors import ConfigError
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl, _register_port, _settings
from flexkv.rank.regions import TensorSpec
from tests.support.harness import until
from tests.support.vllm_stub import request, step, vllm_config


def start(tmp_path: Path, role: str) -> tuple[Any, Any, KVTPClient]:
    port = str(tmp_path / role)
    adapter = FlexKVConnectorV1Impl(vllm_config(port, role=role), KVConnectorRole.SCHEDULER)
    layer = np.zeros((64, 2, 4, 1, 64), dtype=np.int16)
    client = KVTPClient(port, transfer_config=TransferConfig())
    spec = TensorSpec(layer.ctypes.data, layer.shape, tuple(s // 2 for s in layer.strides), 2)
    client.register_tensors([spec], 10.0, keep_alive=layer)
    manager = adapter.scheduler._controller
    until(lambda: manager.is_ready() and manager.stats()["num_slots"] == 64)
    client.advance_fence(load=1 << 30, save=1 << 30)
    return adapter, manager, client


@pytest.mark.parametrize(
    ("role", "saves", "loads"), [("kv_both", True, True), ("kv_producer", True, False), ("kv_consumer", False, True)]
)
@pytest.mark.parametrize("save_mode", ["as_computed", "at_finish"])
def test_roles(role: str, saves: bool, loads: bool, save_mode: str, tmp_path: Path) -> None:
    from vllm.v1.request import RequestStatus

    adapter, manager, client = start(tmp_path, role)
    side = adapter.scheduler
    side._config = side._config.replace(save_mode=save_mode)
    new = request("new", list(range(100, 116)), status=RequestStatus.FINISHED_LENGTH_CAPPED)
    assert side.get_num_new_matched_tokens(new, 0) == (0, False)
    side.update_state_after_alloc(new, SimpleNamespace(get_block_ids=lambda: ([0, 1, 2, 3],)), 0)
    side.build_connector_meta(step({"new": 16}))
    side.request_finished(new, [0, 1, 2, 3])
    manager.wait(side._outstanding, completely=True)
    assert (manager.stats()["indexed_blocks"] > 0) == saves
    task = manager.put_blocks(manager.hasher().keys, 0, np.empty(0, dtype=np.int32))
    assert task is None
    keys = side._track(request("old", list(range(500, 516)))).keys()
    task = manager.put_blocks(keys, 0, np.arange(4, dtype=np.int32))
    manager.wait(task, completely=True)
    again = request("again", list(range(500, 516)))
    before = manager.stats()
    side.on_new_request(again)
    assert (side.get_num_new_matched_tokens(again, 0)[0] > 0) == loads
    counted = {name for name, value in manager.stats().items() if value != before.get(name)}
    assert bool(counted & {"full_hits"}) == loads                   # a producer's requests are no hits and no misses
    adapter.shutdown()
    client.close()


def test_data_parallel_ranks_have_ports_labels_and_files_of_their_own(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] % 60000 + 1024
    settings = {"enable_metrics": True, "py_metrics_port": port, "ssd_cache_gb": 0.01,
                "ssd_cache_dir": f"{tmp_path}/a;{tmp_path}/b", "trace_path": f"{tmp_path}/trace",
                "audit_path": f"{tmp_path}/audit"}
    adapters = [
        FlexKVConnectorV1Impl(vllm_config(f"{tmp_path}/s", rank=rank, settings=settings), KVConnectorRole.SCHEDULER)
        for rank in range(2)
    ]
    try:
        metrics = [adapter.scheduler._controller.metrics for adapter in adapters]
        assert [(m.port, m._labels["engine"]) for m in metrics] == [(port, "0"), (port + 1, "1")]
        assert (tmp_path / "s").is_socket()
        assert (tmp_path / "s.dp1").is_socket()
    finally:
        for adapter in adapters:
            adapter.shutdown()
    first, second = (_settings(vllm_config(rank=rank, settings=settings), rank) for rank in range(2))
    assert first.cache.ssd_cache_dir == settings["ssd_cache_dir"]
    assert second.cache.ssd_directories == [tmp_path / "a/dp1", tmp_path / "b/dp1"]
    assert (second.cache.trace_path, second.connector.audit_path) == (f"{tmp_path}/trace.dp1", f"{tmp_path}/audit.dp1")
    assert _settings(vllm_config(rank=1), 1).cache.trace_path == ""


def test_scheduler_and_worker_of_a_rank_meet_at_the_same_socket() -> None:
    ports = set()
    for rank in range(3):
        config = vllm_config(rank=rank)
        ports.add(_register_port(config, _settings(config, rank)))
    assert len(ports) == 3


def test_a_wrong_setting_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="layerwise_loads"):
        FlexKVConnectorV1Impl(vllm_config(settings={"layerwise_loads": "perhaps"}), KVConnectorRole.SCHEDULER)
