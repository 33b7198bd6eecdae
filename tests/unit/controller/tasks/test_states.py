"""Results that are returned before a task has settled, and the contents of a settled task."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexkv._core.index.radix import RadixTree
from flexkv.cache.plan import DEVICE, Move, PutPlan
from flexkv.cache.tier import HOST
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.controller.tasks import reasons
from flexkv.controller.tasks.task import EndedTask, KVTask, TaskStage
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import OpStatus, TransferGraph, TransferOp
from tests.property.model_tree import keys_of

IDS = np.arange(3, dtype=np.int32)


def running_put(direct: bool) -> KVTask:
    tree, keys = RadixTree(10), keys_of((1, 2, 3))
    plan = PutPlan(keys, (Move(keys, IDS, tree, DEVICE, 1 if direct else HOST, dst=IDS),))
    task = KVTask(7, None, 0, plan, IDS, IDS, 4, 12, loading=False, stage=TaskStage.RUNNING)
    task.graph = TransferGraph(7, [TransferOp(OpKind.D2H, IDS, IDS)])
    return task


@pytest.mark.parametrize("verdict", [OpStatus.TIMEOUT, OpStatus.CANCELLED])
@pytest.mark.parametrize("direct", [False, True])
def test_a_put_straight_to_ssd_has_no_result_before_it_is_at_rest(direct: bool, verdict: OpStatus) -> None:
    task = running_put(direct)
    assert task.graph is not None
    task.graph.verdict = verdict
    if direct:
        assert task.early_result is None
        assert (task.response().status, task.response().reason) == (Status.TIMEOUT, reasons.STILL_RUNS)
    else:
        assert task.early_result is not None
    task.graph.ops[0].resolve(np.arange(3), True)             # though every block was copied
    status, ok, reason = task.outcome(lambda: None)
    assert status is (Status.TIMEOUT if verdict is OpStatus.TIMEOUT else Status.CANCELLED)
    assert not ok.any()
    assert reason


@pytest.mark.parametrize("moved", [3, 2, 0])
def test_a_load_that_is_claimed_after_a_reset_names_no_block(moved: int) -> None:
    cache: Any = SimpleNamespace(epoch=1)
    task = KVTask(7, cache, 1, None, IDS, IDS, 4, 12)
    status = Status.SUCCESS if moved == 3 else Status.FAILED
    ended = EndedTask.of(task, status, np.arange(3) < moved, "" if moved == 3 else "why")
    response = ended.response()
    assert response.return_mask is not None
    assert (response.status, int(response.return_mask.sum())) == (status, 4 * moved)
    cache.epoch = 2
    response = ended.response()
    expected = (Status.CANCELLED, reasons.WAS_RESET) if moved else (Status.FAILED, "why")
    assert (response.status, response.reason) == expected
    assert response.return_mask is not None
    assert not response.return_mask.any()


def test_a_settled_task_keeps_its_result_alone() -> None:
    task = running_put(False)
    ended = EndedTask.of(task, Status.FAILED, np.array([True, False, True]), "why")
    assert ended.blocks is None
    assert ended.positions().tolist() == [0, 1, 2]
    response = ended.response()
    assert (response.status, response.reason) == (Status.FAILED, "why")
    assert response.return_mask is not None
    assert response.return_mask.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    whole = EndedTask.of(task, Status.SUCCESS, np.ones(3, dtype=np.bool_), "")
    assert whole.missing is None
    held = [getattr(whole, name) for name in EndedTask.__slots__]
    assert not any(isinstance(each, (TransferGraph, PutPlan, np.ndarray)) for each in held)
