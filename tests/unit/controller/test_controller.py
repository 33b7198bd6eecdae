"""The controller: while its data plane is out of service, and the seeds of its keys."""

from pathlib import Path

import numpy as np
import pytest

from flexkv._core.index.block_keys import chain_seed, hash_blocks
from flexkv.controller.tasks.arguments import namespace_of
from flexkv.transfer.engine import TransferEngine
from tests.support.harness import TOKENS, controller_of, local, mapping, tokens_of


def test_out_of_service_nothing_is_found_or_saved_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        task = manager.put_async(tokens_of(3), mapping(range(3)))
        manager.wait(task)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(3))
        assert manager.stats()["in_service"] == 1
        with monkeypatch.context() as patch:
            patch.setattr(TransferEngine, "in_service", False)
            assert not manager.is_ready()
            assert manager.blocks.lookup(hasher.keys).num_ready == 0
            for task, mask in (manager.get_match(tokens_of(3)), manager.put_match(tokens_of(3, 1))):
                assert not mask.any()
                manager.cancel(task)
            assert manager.blocks.put_blocks(manager.blocks.hasher().keys, 0, np.zeros(0, dtype=np.int32)) is None
            assert manager.stats()["in_service"] == 0
            assert caplog.text.count("out of service") == 1
        assert manager.blocks.lookup(hasher.keys).num_ready == 3


def test_seeds_that_are_remembered_are_those_of_the_namespace_and_of_the_weights(tmp_path: Path) -> None:
    """Keys of ``get_match`` are those of a hasher, also after other namespaces and after new weights."""
    namespaces: list[list[str] | None] = [None, [], ["a", "b"], ["ab"], ["b", "a"], ["1:a"], ["\N{SNOWMAN}"]]
    with local(tmp_path) as (manager, _, _tensors):
        keys = {}
        for _ in range(2):
            for which, namespace in enumerate(namespaces):
                hasher = manager.blocks.hasher(namespace)
                hasher.extend(tokens_of(2))
                seed = chain_seed(controller_of(manager)._keys._domain, namespace_of(namespace), b"")
                assert hasher.keys.tolist() == hash_blocks(tokens_of(2), TOKENS, seed).tolist()
                assert keys.setdefault(which, hasher.keys.tolist()) == hasher.keys.tolist()
                assert manager.blocks.keys(tokens_of(2), namespace).tolist() == hasher.keys.tolist()
        assert len({str(found) for found in keys.values()}) == len(namespaces) - 1       # None is no entry, as []
        manager.reset(new_weights=True)
        for which, namespace in enumerate(namespaces):
            assert manager.blocks.keys(tokens_of(2), namespace).tolist() != keys[which]
        for number in range(600):
            manager.blocks.keys(tokens_of(1), [f"tenant {number}"])
        assert controller_of(manager)._keys._chain_seed.cache_info().currsize <= 256
