"""Waiting for the ranks: the end of the wait, and the error of a wait that fails."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flexkv import KVManager, KVTPClient
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.errors import FlexKVError, NotReadyError, RegistrationError
from tests.support.harness import TOKENS, Tensors


def manager_at(port: Path, ranks: int = 1) -> KVManager:
    return KVManager(ModelConfig(tp_size=ranks), CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=8),
                     gpu_register_port=str(port), transfer_config=TransferConfig())


def test_it_returns_when_the_last_rank_has_registered(tmp_path: Path) -> None:
    with manager_at(tmp_path / "s", ranks=2) as manager:
        clients = [KVTPClient(str(tmp_path / "s"), intra_client_id=rank) for rank in range(2)]
        waiting = threading.Thread(target=manager.wait_ready, args=(20.0,))
        waiting.start()
        clients[0].register_tensors(Tensors().specs())
        with pytest.raises(NotReadyError, match=r"0 of 2 ranks"):        # one alone is not welcomed
            manager.wait_ready(0.05)
        assert waiting.is_alive()
        clients[1].register_tensors(Tensors().specs())
        waiting.join(20.0)
        assert not waiting.is_alive()
        assert manager.is_ready()
        manager.wait_ready(0.0)
        for client in clients:
            client.close()


def test_it_says_how_many_ranks_are_missing_and_where_they_must_register(tmp_path: Path) -> None:
    with manager_at(tmp_path / "s") as manager:
        before = time.monotonic()
        with pytest.raises(NotReadyError, match=rf"0 of 1 ranks .* at {tmp_path}/s after 0\.1 s") as raised:
            manager.wait_ready(0.1)
        assert time.monotonic() - before < 2.0
        assert isinstance(raised.value, TimeoutError)
        assert isinstance(raised.value, FlexKVError)


def test_it_says_why_a_rank_was_refused(tmp_path: Path) -> None:
    with manager_at(tmp_path / "s") as manager, KVTPClient(str(tmp_path / "s"), dp_client_id=3) as client:
        client.register_tensors(Tensors().specs())
        with pytest.raises(RegistrationError, match="dp_client_id 3"):
            client.wait_connected(20.0)
        with pytest.raises(NotReadyError, match="refused: dp_client_id 3 is not served here"):
            manager.wait_ready(0.05)


@pytest.mark.parametrize(("was_started", "reason"), [(False, "not running"), (True, "was shut down")])
def test_it_does_not_wait_for_a_manager_that_does_not_run(tmp_path: Path, was_started: bool, reason: str) -> None:
    manager = manager_at(tmp_path / "s")
    if was_started:
        manager.start()
        manager.shutdown()
    before = time.monotonic()
    with pytest.raises(NotReadyError, match=reason):
        manager.wait_ready(60.0)
    assert time.monotonic() - before < 5.0


def test_a_shutdown_ends_it(tmp_path: Path) -> None:
    manager = manager_at(tmp_path / "s")
    manager.start()
    closer = threading.Timer(0.2, manager.shutdown)
    closer.start()
    before = time.monotonic()
    with pytest.raises(NotReadyError, match="was shut down"):
        manager.wait_ready(60.0)
    assert time.monotonic() - before < 30.0
    closer.join()


def test_the_context_shuts_down_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), manager_at(tmp_path / "s"):
        (tmp_path / "s").touch(exist_ok=False)
    assert not (tmp_path / "s").exists()


def test_a_client_is_closed_by_its_context(tmp_path: Path) -> None:
    with manager_at(tmp_path / "s") as manager:
        with KVTPClient(str(tmp_path / "s")) as client:
            client.register_tensors([np.zeros((8, TOKENS), dtype=np.int16)])
            manager.wait_ready(20.0)
            client.wait_connected(20.0)                     # its agent starts a little later
            assert client.is_connected
        assert not client.is_connected
