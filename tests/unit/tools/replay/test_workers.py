"""Replays side by side: in order, and gone when the command has gone."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from flexkv.tools.replay.workers import OPT, Task, WorkerError, outcomes

from .traces import SEQUENCES, trace_of

TRACE = trace_of(random.Random(1).choices(SEQUENCES, k=500))


def test_outcomes_come_in_the_order_of_the_tasks() -> None:
    tasks = [Task(policy, capacity) for capacity in (3, 6) for policy in ("adaptive", "lru", "s3fifo", OPT)]
    tasks.append(Task("lru", 3, 6, write_all=True))
    assert list(outcomes(TRACE, tasks, jobs=3)) == list(outcomes(TRACE, tasks))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_trace_without_blocks(jobs: int) -> None:
    assert [outcome.hits for outcome in outcomes(trace_of([()]), [Task("lru", 1), Task(OPT, 1)], jobs)] == [0, 0]


def test_who_has_seen_enough_leaves_no_process_behind() -> None:
    results = outcomes(TRACE, [Task("lru", 3)] * 9, jobs=2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_fails_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError, match="fewer --jobs"):
        list(outcomes(TRACE, [Task("lru", 3), Task("nothing", 3)], jobs=2))
    assert multiprocessing.active_children() == []
    assert "eviction_policy = 'nothing'" in capfd.readouterr().err         # what went wrong in it


def test_no_room_for_the_trace_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(WorkerError, match="try --jobs 1"):
        list(outcomes(TRACE, [Task("lru", 3), Task("lru", 4)], jobs=2))


@pytest.fixture
def command(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """A command with much left to do, and a process tenant of its own; it has workers, and has printed a line."""
    choose, path = random.Random(2), tmp_path / "trace"
    path.write_text("".join(
        json.dumps({"timestamp": i, "hash_ids": [choose.randrange(9), *range(1000 * i, 1000 * i + 5)]}) + "\n"
        for i in range(2000)
    ))
    with subprocess.Popen(
        [sys.executable, "-m", "flexkv.cli", "replay", str(path), "--policy", "all", "--jobs", "2", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),    # a test run in the background ignores it
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("{")
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def gone(tenant: int, timeout_s: float = 30.0) -> bool:
    """Whether all processes of a tenant end in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            os.killpg(tenant, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_an_interrupt_ends_it_quietly_with_all_workers(command: "subprocess.Popen[str]") -> None:
    os.killpg(command.pid, signal.SIGINT)                 # as the terminal does
    _, err = command.communicate(timeout=30)
    assert (command.returncode, err) == (128 + signal.SIGINT, "")
    assert gone(command.pid)


def test_workers_do_not_outlive_a_command_that_is_killed(command: "subprocess.Popen[str]") -> None:
    command.kill()
    command.wait()
    assert gone(command.pid)
