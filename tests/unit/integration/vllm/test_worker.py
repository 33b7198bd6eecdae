"""The worker side of the vLLM adapter, step by step, with a client that does as the test says."""

from typing import Any

import numpy as np
import pytest
import torch

from flexkv.config import ConnectorConfig
from flexkv.errors import RegistrationError
from flexkv.integration.vllm.audit import PageAudit
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadJob
from flexkv.integration.vllm.worker import WorkerSide, page_spec
from flexkv.protocol.ring import OpKind
from flexkv.rank.results import OpResult


class FakeClient:
    """A rank's client without an agent."""

    def __init__(self) -> None:
        self.results: list[OpResult] = []
        self.fences: list[tuple[int | None, int | None]] = []
        self.is_lost, self.num_ended = False, 0
        self.writes = True
        self.waits = 0
        self.follows = True

    def has_lost(self, task_id: int, since: int) -> bool:
        return self.is_lost or since != self.num_ended

    def advance_fence(self, load: int | None = None, save: int | None = None, stream: int | None = None) -> None:
        self.fences.append((load, save))

    def follow_load(self, task_id: int, tensor: int | None, timeout_s: float, stream: int | None = None) -> bool:
        return self.follows

    def poll_results(self) -> list[OpResult]:
        results, self.results = self.results, []
        return results

    def wait_results(self, timeout_s: float) -> bool:
        self.waits += 1
        return bool(self.results)


def ended(task_id: int, kind: OpKind, ok: list[bool], pages: list[int]) -> OpResult:
    return OpResult(task_id, kind, np.array(pages, dtype=np.int32), np.array(ok))


def job(req_id: str, task_id: int, *pages: int) -> LoadJob:
    return LoadJob(req_id, task_id, np.array(pages, dtype=np.int32))


@pytest.fixture
def side() -> Any:
    client = FakeClient()
    return WorkerSide(client, ConnectorConfig()), client  # type: ignore[arg-type]


def step(worker: WorkerSide, number: int, has_forward: bool = True, **fields: Any) -> tuple[set[str], set[str]]:
    worker.start_load(FlexKVConnectorMetadata(number, has_forward, **fields))
    worker.wait_for_save()
    return worker.get_finished()


def test_a_rank_that_writes_nothing_does_not_wait_for_saves(side: Any) -> None:
    worker, client = side
    client.writes = False
    assert step(worker, 1, finishing={"a": [7]}) == ({"a"}, set())
    client.writes = True
    assert step(worker, 2, finishing={"b": [8]}) == (set(), set())


def test_fences_follow_the_steps(side: Any) -> None:
    worker, client = side
    step(worker, 1)
    step(worker, 2)
    assert client.fences == [(1, None), (None, 1), (2, None), (None, 2)]


def test_a_step_begins_once(side: Any) -> None:
    """At its first layer, if vLLM starts its loads after compute was launched; and then not again."""
    worker, client = side
    assert worker.between_steps
    meta = FlexKVConnectorMetadata(1, True, loads=[job("a", 5, 10)])
    worker.start_load(meta)
    assert not worker.between_steps
    client.results = [ended(5, OpKind.H2D, [True], [10])]
    assert worker.get_finished() == (set(), {"a"})
    worker.start_load(meta)
    worker.wait_for_save()
    assert worker.between_steps
    assert worker.get_finished() == (set(), set())
    assert client.fences == [(1, None), (None, 1)]


def test_a_load_is_reported_once_with_its_failures_in_the_same_step(side: Any) -> None:
    worker, client = side
    assert step(worker, 1, loads=[job("a", 5, 10, 11, 12), job("b", 6, 20)]) == (set(), set())
    client.results = [ended(5, OpKind.H2D, [True, False, True], [10, 11, 12])]
    assert step(worker, 2) == (set(), {"a"})
    assert worker.take_failed_pages() == {11}
    assert worker.take_failed_pages() == set()
    client.results = [ended(6, OpKind.H2D, [True], [20])]
    assert step(worker, 3) == (set(), {"b"})
    assert worker.take_failed_pages() == set()
    assert step(worker, 4) == (set(), set())


def test_a_load_that_ended_before_its_step_arrived_is_not_lost(side: Any) -> None:
    worker, client = side
    client.results = [ended(5, OpKind.H2D, [False], [10])]
    assert worker.get_finished() == (set(), set())
    assert step(worker, 1, loads=[job("a", 5, 10)]) == (set(), {"a"})
    assert worker.take_failed_pages() == {10}


def test_a_finished_request_is_reported_when_all_its_saves_are_done(side: Any) -> None:
    worker, client = side
    client.results = [ended(1, OpKind.D2H, [True], [3])]
    assert step(worker, 1) == (set(), set())
    assert step(worker, 2, finishing={"a": [1, 2]}, oldest_task=2) == (set(), set())
    client.results = [ended(2, OpKind.D2H, [False], [4])]
    assert step(worker, 3, oldest_task=9) == ({"a"}, set())
    assert step(worker, 4) == (set(), set())
    assert not worker._saved


def test_steps_without_compute_wait_a_little(side: Any) -> None:
    worker, client = side
    step(worker, 1, has_forward=False)
    assert client.waits == 0                                 # for nothing
    step(worker, 2, loads=[job("a", 5, 10)])
    assert client.waits == 0
    step(worker, 3, has_forward=False)
    assert client.waits == 1


@pytest.mark.parametrize("follows", [True, False])
def test_compute_that_did_not_wait_for_its_load_is_not_trusted(side: Any, follows: bool) -> None:
    worker, client = side
    client.follows = follows
    load = job("a", 5, 10, 11)
    load.layerwise = True
    worker.start_load(FlexKVConnectorMetadata(1, True, loads=[load]))
    worker.wait_for_layer("model.layers.0.self_attn.attn")
    client.results = [ended(5, OpKind.H2D, [True, True], [10, 11])]
    assert worker.get_finished() == (set(), set())           # it runs already: nothing to report but what is wrong
    assert worker.take_failed_pages() == (set() if follows else {10, 11})


def test_a_lost_controller_fails_loads_and_lets_saves_go(side: Any) -> None:
    worker, client = side
    step(worker, 1, loads=[job("a", 5, 10, 11)], finishing={"b": [7]})
    client.is_lost = True
    assert step(worker, 2) == ({"b"}, {"a"})
    assert worker.take_failed_pages() == {10, 11}


def test_a_rank_that_has_registered_again_has_lost_its_loads(side: Any) -> None:
    """The controller dropped their ops when the connection ended, so the worker must report them as failed."""
    worker, client = side
    step(worker, 1, loads=[job("a", 5, 10, 11)])
    client.num_ended = 1
    assert step(worker, 2, loads=[job("b", 6, 12)]) == (set(), {"a"})
    assert worker.take_failed_pages() == {10, 11}


def test_a_save_that_no_rank_was_asked_for_ends(side: Any) -> None:
    worker, _ = side
    assert step(worker, 1, finishing={"a": [7, 8]}, oldest_task=7) == (set(), set())
    assert step(worker, 2, ended=[7], oldest_task=8) == (set(), set())
    assert step(worker, 3, ended=[8], oldest_task=9) == ({"a"}, set())


@pytest.mark.parametrize(
    ("shape", "num_blocks", "page_dim", "tokens_per_page"),
    [
        ((9, 2, 4, 8), 9, 0, None), ((9, 2, 4, 2, 8), 9, 0, None), ((2, 9, 4, 2, 8), 9, 1, None),
        ((9, 4, 8), 9, 0, None), ((18, 2, 4, 8), 9, 0, 2), ((2, 3, 4, 2, 8), 3, 1, None), ((2, 5, 4, 8), 2, 0, None),
    ],
)
def test_which_dimension_counts_blocks(
    shape: tuple[int, ...], num_blocks: int, page_dim: int, tokens_per_page: int | None
) -> None:
    spec = page_spec(torch.zeros(shape), num_blocks)
    assert (spec.page_dim, spec.tokens_per_page) == (page_dim, tokens_per_page)


def test_an_ambiguous_shape_is_refused() -> None:
    with pytest.raises(RegistrationError, match="is ambiguous"):
        page_spec(torch.zeros(2, 2, 4, 2, 8), 2)
    with pytest.raises(RegistrationError, match="cannot hold 10 blocks"):
        page_spec(torch.zeros(9, 2, 4, 8), 10)


def test_the_audit_notices_a_single_bit() -> None:
    tensor = torch.randint(0, 100, (6, 2, 4, 8), dtype=torch.int16)
    audit = PageAudit([tensor], [page_spec(tensor, 6)])
    keys, pages = np.arange(4, dtype=np.uint64).reshape(2, 2), np.array([1, 2], dtype=np.int32)
    audit.record(keys, pages)
    tensor[4], tensor[5] = tensor[1], tensor[2]
    elsewhere, both = np.array([4, 5], dtype=np.int32), np.array([True, True])
    audit.compare(keys, elsewhere, both)
    assert audit.counts() == {"checked_blocks": 2, "wrong_blocks": 0, "wrong_bytes": 0, "unknown_blocks": 0}
    tensor[5, 1, 3, 7] ^= 1
    audit.compare(keys, elsewhere, both)
    audit.compare(keys + 9, elsewhere, np.array([True, False]))
    assert audit.counts() == {"checked_blocks": 5, "wrong_blocks": 1, "wrong_bytes": 128, "unknown_blocks": 1}


def test_the_audit_compares_the_pages_that_arrived_in_whatever_order(side: Any) -> None:
    worker, client = side
    tensor = torch.randint(0, 100, (6, 2, 4, 8), dtype=torch.int16)
    worker._audit = PageAudit([tensor], [page_spec(tensor, 6)])
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2)
    worker._audit.record(keys, np.array([1, 2, 3], dtype=np.int32))
    tensor[1] += 1                                             # where the load failed, the page has other content
    client.results = [ended(7, OpKind.H2D, [True, True, False], [2, 3, 1])]
    loaded = LoadJob("r", 7, np.array([1, 2, 3], dtype=np.int32), keys)
    assert step(worker, 1, loads=[loaded]) == (set(), {"r"})
    assert worker.take_failed_pages() == {1}
    assert worker.audit_counts() == {"checked_blocks": 2, "wrong_blocks": 0, "wrong_bytes": 0, "unknown_blocks": 0}


def test_an_agent_that_never_ends_a_load_is_stopped(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step would wait for ever; once the agent is stopped, nothing writes the pages."""
    worker, client = side
    monkeypatch.setattr("flexkv.integration.vllm.worker._LOAD_TIMEOUT_S", 0.01)
    monkeypatch.setattr(client, "leave", lambda: setattr(client, "is_lost", True), raising=False)
    load = job("a", 5, 10, 11)
    load.layerwise = True
    worker.start_load(FlexKVConnectorMetadata(1, True, loads=[load]))
    assert worker.get_finished() == (set(), set())
    assert worker.take_failed_pages() == {10, 11}


def test_a_save_that_ends_before_its_request_is_known_to_finish_is_remembered(side: Any) -> None:
    """With steps in flight it is launched after the step was made in which it ends."""
    worker, client = side
    client.results = [ended(7, OpKind.D2H, [True], [4])]
    assert step(worker, 2, oldest_task=7) == (set(), set())
    assert step(worker, 3, finishing={"a": [7]}, oldest_task=8) == ({"a"}, set())
