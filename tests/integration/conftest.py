"""Engines in this process."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGES, SLOTS = 64, 400


@pytest.fixture
def quiet() -> Iterator[None]:
    """The log of the process afterwards is as before: vLLM, and FlexKV inside it, change it."""
    logs = [logging.getLogger(name) for name in ("flexkv", "vllm", "")]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in logs]
    yield
    for log, handlers, level, propagate in before:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture
def engines(tmp_path: Path, quiet: None) -> Iterator[Any]:
    """Makes engines with vLLM's scheduler and FlexKV, and closes them."""
    from tests.integration.context_parallel import ContextParallelEngine
    from tests.integration.paged_engine import PagedEngine

    made: list[PagedEngine] = []

    def make(
        depth: int = 1, ranks: int = 1, slots: int = SLOTS, seed: int = 0, transfer: Any = None, layout: Any = None,
        **settings: Any,
    ) -> PagedEngine:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        settings = {"num_cpu_blocks": slots, **settings}
        common = {"depth": depth, "seed": seed, "transfer": transfer}
        if layout is not None:
            made.append(ContextParallelEngine(layout, directory, PAGES, settings, **common))
        else:
            made.append(PagedEngine(directory, PAGES, settings, ranks=ranks, **common))
        made[-1].wait_ready(slots)
        return made[-1]

    yield make
    for engine in made:
        engine.close()
