"""Start on a real GPU: a pool is pinned while an engine's steps run, and its slots hold what they are given."""

import numpy as np
import pytest

from flexkv.protocol.ring import OpKind
from flexkv.tools.bench import start

pytestmark = pytest.mark.gpu


def moved(pool: start.Start, slots: np.ndarray) -> bool:
    """Whether pages come back through these slots as they were."""
    import torch

    pages = np.arange(len(slots), dtype=np.int32)
    pool.pages.copy_(torch.randint(0, 256, pool.pages.shape, dtype=torch.uint8, device="cuda"))
    before = pool.pages.clone()
    for number, kind in enumerate((OpKind.D2H, OpKind.H2D)):
        if kind is OpKind.H2D:
            pool.pages.zero_()
        torch.cuda.synchronize()
        assert pool.rings.push_op(number + 1, number + 1, kind, 0, slots, pages, len(slots))
        left = len(slots)
        while left:
            result = pool.rings.pop_result()
            assert pool.agent.status == 0
            if result is not None:
                assert result[2].all()
                left -= len(result[2])
    return bool(torch.equal(pool.pages, before))


def test_a_pool_is_pinned_beside_running_steps(capsys: pytest.CaptureFixture[str]) -> None:
    checked = []

    def check(pool: start.Start) -> None:
        assert pool.agent.pinned_slots == pool.pool.num_slots
        every = np.arange(pool.pool.num_slots, dtype=np.int32)
        for slots in (every[:64], every[-64:], every[::32][:64]):              # over borders of parts, too
            checked.append(moved(pool, np.ascontiguousarray(slots)))

    lines = list(start.run(4, check))
    assert checked == [True] * 3
    with capsys.disabled():
        print(*lines, sep="\n")
