"""Loads that ranks exchange, around vLLM's real scheduler: answers, and the content of every block on each rank, are
those of computing."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.protocol.ring import OpKind
from flexkv.transfer.executor import Progress
from flexkv.transfer.executors import device
from flexkv.transfer.executors.device import DeviceExecutor
from flexkv.transfer.graph import TransferOp
from tests.integration.context_parallel import Layout
from tests.integration.test_context_parallel import LAYOUTS
from tests.integration.test_paged_oracle import expect_right


@pytest.mark.parametrize("depth", [2, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("layout", [LAYOUTS["dcp 2 tp 4, copies"], Layout(8, 2, 4, 1), Layout(8, 2, 1, 2)])
def test_nothing_wrong_is_answered_or_kept(
    engines: Any, monkeypatch: pytest.MonkeyPatch, layout: Layout, depth: int
) -> None:
    """Also if loads fail on one rank, or on all."""
    second: list[int] = []
    submit = DeviceExecutor.submit

    def record(
        self: DeviceExecutor, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False
    ) -> None:
        if op.kind is OpKind.P2D and not failed:
            second.append(len(indices))
        submit(self, op, indices, progress, failed)

    monkeypatch.setattr(DeviceExecutor, "submit", record)
    monkeypatch.setattr(device, "_EXCHANGE_BYTES", 1)
    engine = engines(depth, layout=layout, layerwise_loads="never")
    forget = engine.scheduler.reset_prefix_cache                    # does nothing while a request has pages
    assert expect_right(engine, 60, 5, per_step=0.1, share=0.25, pace=forget, least=20) > 0
    assert engine.side.stats()["hit_tokens"] > 10 * layout.page_tokens
    assert len(second) > 10
