"""Decode context parallelism around vLLM's real scheduler. Every block of the cache, on each rank, has bit by bit the
content that computing its tokens writes: the layout of pages is that of vLLM's own kernel."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.worker import block_table

from flexkv.integration.vllm.worker import WorkerSide
from tests.integration.context_parallel import Layout
from tests.integration.paged_engine import PagedEngine
from tests.integration.paged_model import BLOCK
from tests.integration.test_paged_oracle import MODES, expect_right

LAYOUTS = {
    "dcp 2 tp 2": Layout(2, 2), "dcp 2 tp 2 interleave 4": Layout(2, 2, 4),
    "dcp 2 tp 2 interleave block": Layout(2, 2, BLOCK),
    "dcp 2 tp 4, two heads": Layout(4, 2, 1, 2), "dcp 2 tp 4, two heads, interleave 8": Layout(4, 2, 8, 2),
    "dcp 2 tp 4, copies": Layout(4, 2, 2, 1), "dcp 4 tp 4": Layout(4, 4), "dcp 4 tp 4 interleave 2": Layout(4, 4, 2),
}


class Pointer:
    """As much of a pointer as the kernel uses: ``base + offsets``."""

    def __init__(self, values: np.ndarray, at: Any = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.values, self.at + offset)


class Numbers:
    """As much of ``triton.language`` as the kernel uses, on numpy."""

    int64, where, arange = np.int64, staticmethod(np.where), staticmethod(np.arange)

    class Array(np.ndarray):
        def to(self, dtype: Any) -> np.ndarray:
            return self.astype(dtype)

    def program_id(self, axis: int) -> int:
        return 0

    def num_programs(self, axis: int) -> int:
        return 2

    def load(self, pointer: Pointer, mask: Any = True, other: int = 0) -> np.ndarray:
        at, mask = np.broadcast_arrays(pointer.at, mask)
        return np.where(mask, pointer.values[np.where(mask, at, 0)], other).view(self.Array)

    def store(self, pointer: Pointer, values: np.ndarray, mask: Any) -> None:
        pointer.values[pointer.at[mask]] = values[mask]


def slots_of_vllm(layout: Layout, pages: np.ndarray, num_tokens: int, share: int) -> np.ndarray:
    """Slots of tokens 0, 1, ... on a rank with vLLM's kernel; -1: the token is on another rank."""
    slots = np.full(num_tokens, -9)
    with patch.object(block_table, "tl", Numbers()):
        block_table.ComputeSlotMappingKernel.kernel(
            num_tokens, num_tokens, Pointer(np.array([0, num_tokens])), Pointer(np.arange(num_tokens)), Pointer(pages),
            len(pages), Pointer(slots), BLOCK, layout.shares, share, layout.interleave, -1, 1024,
        )
    return slots


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_of_pages_is_that_of_vllm(layout: Layout) -> None:
    num_tokens = 3 * layout.page_tokens + layout.page_tokens // 2 + 3
    pages = np.array([7, 3, 5, 1])
    page, owner, place = layout.place(np.arange(num_tokens))
    for share in range(layout.shares):
        slots = slots_of_vllm(layout, pages, num_tokens, share)
        np.testing.assert_array_equal(slots, np.where(owner == share, pages[page] * BLOCK + place, -1))
        lengths = torch.arange(num_tokens + 1)
        counts = get_dcp_local_seq_lens(lengths, layout.shares, share, layout.interleave)
        np.testing.assert_array_equal(counts[1:], np.cumsum(owner == share))


def copies_of(engine: PagedEngine) -> list[str | None]:
    sides = [worker.connector._flexkv_connector.worker for worker in engine.workers]
    assert all(isinstance(side, WorkerSide) for side in sides)
    return [side._copy for side in sides]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_prompts_that_differ_inside_a_page_share_nothing_of_it(engines: Any, layout: Layout) -> None:
    """The prompts are equal in more tokens than the block of one rank holds."""
    engine = engines(layout=layout, layerwise_loads="never")
    assert engine.page_tokens == layout.page_tokens
    if layout.groups == 1 or layout.heads == layout.groups:
        assert copies_of(engine) == [None] * layout.ranks
    else:
        assert copies_of(engine) == [f"head 0, share {rank % layout.shares}" for rank in range(layout.ranks)]
    size = layout.page_tokens
    common = list(range(3, 3 + size + BLOCK))                       # one page, and a part of the next one
    first, second = ([*common, *[last] * (2 * size)] for last in (300, 400))
    loaded = []
    for i, prompt in enumerate((first, second, second, first)):
        before = engine.side.stats()["hit_tokens"]
        engine.add(f"r{i}", prompt, 5)
        engine.run()
        engine.settle()
        loaded.append(engine.side.stats()["hit_tokens"] - before)
        assert engine.answers[f"r{i}"] == layout.answer(prompt, 5)
        engine.forget()
        for worker in engine.workers:                               # nothing that was computed before is left in a page
            for cache in worker.caches:
                cache.fill_(-1)
    whole = len(first) // size * size
    assert loaded == [0, size, whole, whole]
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked) == (0, 2 * (whole // size) - 1)


@pytest.mark.parametrize(("mode", "depth"), [("never", 2)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_wrong_is_answered_or_kept(engines: Any, layout: Layout, mode: str, depth: int) -> None:
    """Also if loads fail on one rank, or on all."""
    engine = engines(depth, layout=layout, layerwise_loads=mode)
    forget = engine.scheduler.reset_prefix_cache                    # does nothing while a request has pages
    assert expect_right(engine, 60, 5, per_step=0.1, share=0.25, pace=forget, least=20) > 0
    assert engine.side.stats()["hit_tokens"] > 10 * layout.page_tokens


@pytest.mark.parametrize("writers", ["rank0_only", "rank_rotate"])
def test_one_rank_writes_the_copy_of_each_share(engines: Any, writers: str) -> None:
    engine = engines(layout=LAYOUTS["dcp 2 tp 4, copies"], kv_shared_across_ranks_mode=writers)
    expect_right(engine, 40, 7, least=20)


def test_blocks_come_from_ssd(engines: Any, tmp_path: Path) -> None:
    engine = engines(
        slots=30, layout=LAYOUTS["dcp 2 tp 4, two heads, interleave 8"], layerwise_loads="never", ssd_cache_gb=0.05,
        ssd_cache_dir=str(tmp_path / "ssd"), ssd_admission="all", load_policy="always",
    )
    expect_right(engine, 60, 6, least=20)
    assert engine.manager.stats()["ssd_store_blocks_read"] > 0


@pytest.mark.parametrize(("layout", "name", "wrong"), [
    ("dcp 2 tp 2", "page_tokens", lambda config: BLOCK), ("dcp 2 tp 4, copies", "copy_name", lambda *args: "head 0"),
])
def test_the_oracle_sees_what_is_wrong(engines: Any, layout: str, name: str, wrong: Any) -> None:
    """An adapter that counts in blocks of one rank, or takes ranks with different tokens for copies, is found out."""
    with patch(f"flexkv.integration.vllm.vllm_v1_adapter.{name}", wrong):
        engine = engines(layout=LAYOUTS[layout], layerwise_loads="never")
    with pytest.raises(AssertionError):
        expect_right(engine, 60, 5, least=20)


@pytest.mark.nightly
@pytest.mark.parametrize(("mode", "depth", "per_step"), MODES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_wrong_is_answered_or_kept_over_a_night(
    engines: Any, layout: Layout, mode: str, depth: int, per_step: float
) -> None:
    for seed in range(200, 205):
        engine = engines(depth, layout=layout, seed=seed, layerwise_loads=mode)
        expect_right(engine, 80, seed, per_step, share=0.05 if seed % 2 else 0.3, least=20)
        engine.close()
