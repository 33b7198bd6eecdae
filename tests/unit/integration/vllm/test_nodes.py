"""Settings of a vLLM engine on several nodes, and the worker that starts the storage host."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.config import FlexKVConfig, TransferConfig
from flexkv.integration.vllm import nodes


def vllm_config(**parallel: Any) -> Any:
    given = {"nnodes": 2, "world_size": 4, "rank": 0, "master_addr": "10.0.0.1", **parallel}
    return SimpleNamespace(parallel_config=SimpleNamespace(**given))


def config(given: tuple[str, ...] = (), **transfer: Any) -> FlexKVConfig:
    return FlexKVConfig(transfer=TransferConfig(node_secret="s", **transfer), given=dict.fromkeys(given, "test"))


def test_an_engine_on_one_node_is_left_alone() -> None:
    one, settings = vllm_config(nnodes=1), FlexKVConfig()
    assert nodes.num_nodes(one) == 1
    assert nodes.unsupported_nodes(one, settings) is None
    assert nodes.settings_of_nodes(one, settings, 3) is settings


def test_nodes_of_a_data_parallel_rank_count() -> None:
    assert nodes.num_nodes(vllm_config(nnodes=4, nnodes_within_dp=2)) == 2
    assert nodes.num_nodes(SimpleNamespace(parallel_config=SimpleNamespace())) == 1      # type: ignore[arg-type]


def test_caching_is_off_without_a_secret_or_with_unequal_nodes() -> None:
    assert "node_secret" in str(nodes.unsupported_nodes(vllm_config(), FlexKVConfig()))
    assert "equal" in str(nodes.unsupported_nodes(vllm_config(world_size=5), config()))
    assert nodes.unsupported_nodes(vllm_config(), config()) is None


def test_the_first_node_is_vllms_unless_it_is_given() -> None:
    transfer = nodes.settings_of_nodes(vllm_config(), config(server_client_mode=True), 0).transfer
    assert (transfer.master_host, transfer.master_port, transfer.uses_daemon) == ("10.0.0.1", 5556, False)
    given = config(("master_host",), master_host="flexkv.example", master_ports="7000,7001")
    transfer = nodes.settings_of_nodes(vllm_config(), given, 2).transfer
    assert (transfer.master_host, transfer.master_port) == ("flexkv.example", 7002)


@pytest.mark.parametrize(("rank", "starts"), [(0, False), (1, False), (2, True), (3, False)])
def test_one_worker_of_each_further_node_starts_a_storage_host(
    monkeypatch: pytest.MonkeyPatch, rank: int, starts: bool
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        nodes.TransferManagerOnRemote, "create_process", lambda *args, **settings: started.append((args, settings))
    )
    nodes.start_storage_host(vllm_config(rank=rank), config(), "/tmp/s")
    assert bool(started) is starts
    if starts:
        [(args, settings)] = started
        assert args == ("localhost", "5556")
        assert (settings["gpu_register_port"], settings["node_secret"]) == ("/tmp/s", "s")
