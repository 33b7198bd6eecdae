"""The controller while its data plane is out of service."""

from pathlib import Path

import numpy as np
import pytest

from flexkv.transfer.engine import TransferEngine
from tests.harness import local, mapping, tokens_of


def test_out_of_service_nothing_is_found_or_saved_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        task = manager.put_async(tokens_of(3), mapping(range(3)))
        manager.wait(task)
        hasher = manager.hasher()
        hasher.extend(tokens_of(3))
        assert manager.stats()["in_service"] == 1
        with monkeypatch.context() as patch:
            patch.setattr(TransferEngine, "in_service", False)
            assert not manager.is_ready()
            assert manager.lookup(hasher.keys).num_ready == 0
            for task, mask in (manager.get_match(tokens_of(3)), manager.put_match(tokens_of(3, 1))):
                assert not mask.any()
                manager.cancel(task)
            assert manager.put_blocks(manager.hasher().keys, 0, np.zeros(0, dtype=np.int32)) is None
            assert manager.stats()["in_service"] == 0
            assert caplog.text.count("out of service") == 1
        assert manager.lookup(hasher.keys).num_ready == 3
