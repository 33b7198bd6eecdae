"""Threads that wait for a task until nothing of it is left learn of its end at once, however it ends."""

import threading
import time
from pathlib import Path

import pytest

from tests.support.harness import controller_of, local, tokens_of, until


@pytest.mark.parametrize("end", ["cancel", "expire", "reset", "shutdown"])
@pytest.mark.parametrize("save", [False, True])
def test_who_waits_for_a_matched_task_learns_of_its_end(tmp_path: Path, save: bool, end: str) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        match = manager.put_match if save else manager.get_match
        task, _ = match(tokens_of(2))
        took: list[float] = []

        def wait() -> None:
            start = time.monotonic()
            manager.wait(task, timeout=10.0, completely=True)
            took.append(time.monotonic() - start)

        waiter = threading.Thread(target=wait)
        waiter.start()
        until(lambda: bool(controller_of(manager)._cache.transfer._news._waiters))       # type: ignore[attr-defined]
        if end == "expire":
            clock = controller_of(manager).tasks._clock
            controller_of(manager).tasks._clock = lambda: clock() + 1000.0
            controller_of(manager).tasks.run_background_work()
        elif end == "cancel":
            manager.cancel(task)
        elif end == "reset":
            manager.reset()
        else:
            manager.shutdown()
            manager.cancel(task)
        waiter.join(5.0)
        assert took
        assert took[0] < 5.0
