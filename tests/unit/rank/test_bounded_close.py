"""A rank whose driver hangs while it pins the pool: ``close`` ends, and nothing is freed that the driver may touch."""

import threading
from pathlib import Path
from typing import Any

import pytest

from flexkv.rank import rank
from tests.support.harness import Tensors, make_manager


@pytest.mark.parametrize("way", ["close", "suspend"])
def test_a_driver_that_hangs_while_it_pins_does_not_hold_up_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Hanging:
        """Pins for ever."""

        def __init__(self, agent: Any, pause: Any) -> None: ...

        def run(self) -> None:
            entered.set()
            go_on.wait(30)

    monkeypatch.setattr(rank, "PoolPinner", Hanging)
    monkeypatch.setattr(rank, "_CLOSE_S", 0.2)
    monkeypatch.setattr(rank, "_left_behind", left := [])
    manager = make_manager(tmp_path / "s")
    tensors = Tensors()
    client = rank.RankClient(str(tmp_path / "s"))
    client.register_tensors(tensors.specs(), keep_alive=tensors)
    assert entered.wait(10)
    agent, thread = client._agent, client._thread
    assert agent is not None
    assert thread is not None
    getattr(client, way)()
    assert [record for record in caplog.records if "has not pinned a part" in record.message]
    assert any(held is agent for held, _ in left)
    assert any(isinstance(held, tuple) and held[0] is tensors for held, _ in left)
    client.close()
    go_on.set()
    thread.join(10)
    agent.close()
    manager.shutdown()
