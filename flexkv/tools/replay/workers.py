"""Replays of one trace, in this process or side by side in several."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import cast

import numpy as np

from flexkv.errors import FlexKVError
from flexkv.tools.replay.bounds import optimal_hits
from flexkv.tools.replay.progress import progress
from flexkv.tools.replay.simulation import Outcome, Simulation
from flexkv.tools.replay.trace import Trace

OPT = "opt"
"""In place of a policy: the clairvoyant cache."""

_TELL_S = 0.1
"""A worker tells of its progress, and notices that nobody waits for it any more, so often."""


_TERMINATE_S = 10.0
"""Longest wait for a worker that was terminated; then it is killed."""


class WorkerError(FlexKVError, RuntimeError):
    """Replays cannot be spread over processes, or one of these processes ended too early."""


@dataclass(frozen=True, slots=True)
class Task:
    """One replay: a policy, or ``OPT``, at one capacity. Arguments as ``Simulation`` has them."""

    policy: str
    host_blocks: int
    ssd_blocks: int = 0
    write_all: bool = False


def outcomes(trace: Trace, tasks: Sequence[Task], jobs: int = 1) -> Generator[Outcome]:
    """What each task gave, in the order of the tasks.

    With more than one job as many processes share the work, at most one for each task. They have gone when the
    iterator ends, is closed, or raises.

    Raises
    ------
    WorkerError
    """
    requests = sum(trace.num_requests for task in tasks if task.policy != OPT)
    with progress(requests, trace.name) as bar:
        if min(jobs, len(tasks)) > 1:
            results = _side_by_side(trace, tasks, min(jobs, len(tasks)), bar.update)
        else:
            results = (_carry_out(trace, task, bar.update) for task in tasks)
        with closing(results):
            for outcome in results:
                bar.clear()                              # it is printed now
                yield outcome


def _carry_out(trace: Trace, task: Task, told: Callable[[int], object]) -> Outcome:
    if task.policy == OPT:
        return Outcome(optimal_hits(trace, task.host_blocks + task.ssd_blocks))
    return Simulation(task.policy, task.host_blocks, task.ssd_blocks, task.write_all).run(trace, told)


# ---- this process ---------------------------------------------------------------------------------------------------


def _side_by_side(
    trace: Trace, tasks: Sequence[Task], jobs: int, told: Callable[[int], object]
) -> Generator[Outcome]:
    waiting = iter(enumerate(tasks))
    done: dict[int, Outcome] = {}
    with _shared(trace) as shared, _workers(shared, jobs) as workers:
        busy: dict[Connection, int] = {}

        def give_next(worker: Connection) -> None:
            number, task = next(waiting, (-1, None))
            if task is not None:
                busy[worker] = number
                worker.send(task)

        try:
            for worker in workers:
                give_next(worker)
            for number in range(len(tasks)):
                while number not in done:
                    for worker in cast(list[Connection], wait(busy)):
                        message = worker.recv()
                        if isinstance(message, Outcome):
                            done[busy.pop(worker)] = message
                            give_next(worker)
                        else:
                            told(message)
                yield done.pop(number)
        except (EOFError, ConnectionError) as error:
            raise WorkerError(
                "a process that replays ended too early, for want of memory perhaps: try fewer --jobs"
            ) from error


@contextmanager
def _workers(shared: "SharedTrace", count: int) -> Iterator[list[Connection]]:
    """A connection to each of so many processes, which are ended at the end."""
    context = get_context("spawn")
    processes, connections = [], []
    resource_tracker.ensure_running()                    # else the first start does it, and lets interrupts through
    # An interrupt from the keyboard goes to all processes of the terminal; it is this one that ends the others.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            for _ in range(count):
                mine, theirs = context.Pipe()
                with theirs:
                    process = context.Process(target=_work, args=(theirs, shared), daemon=True)
                    process.start()
                processes.append(process)
                connections.append(mine)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_TERMINATE_S)
            if process.is_alive():
                process.kill()
                process.join(_TERMINATE_S)
        for connection in connections:
            connection.close()


@contextmanager
def _shared(trace: Trace) -> Iterator["SharedTrace"]:
    """A trace in a file without a name, which other processes can map while this lasts."""
    arrays = trace.seconds, trace.starts, trace.keys, trace.next_use
    try:
        with tempfile.TemporaryFile() as file:
            for array in arrays:
                array.tofile(file)
            file.flush()
            yield SharedTrace(
                f"/proc/{os.getpid()}/fd/{file.fileno()}", trace.name, trace.block_tokens, trace.is_timed,
                trace.num_requests, trace.num_blocks,
            )
    except OSError as error:
        raise WorkerError(f"the work cannot be shared between processes ({error}): try --jobs 1") from error


# ---- a worker -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SharedTrace:
    """Where the arrays of a trace are, one behind the other, all of items of 8 bytes."""

    path: str
    name: str
    block_tokens: int
    is_timed: bool
    num_requests: int
    num_blocks: int

    def open(self) -> Trace:
        """The trace, in memory that all who open it share."""
        words = np.asarray(np.memmap(self.path, dtype=np.uint64, mode="r"))
        ends = np.cumsum([self.num_requests, self.num_requests + 1, 2 * self.num_blocks])
        seconds, starts, keys, next_use = np.split(words, ends)
        return Trace(
            self.name, self.block_tokens, seconds.view(np.float64), starts.view(np.int64), keys.reshape(-1, 2),
            next_use.view(np.int64), self.is_timed,
        )


def _work(connection: Connection, shared: SharedTrace) -> None:
    """Carry out what comes, until nothing more can."""
    trace = shared.open()
    news, told_at = 0, time.monotonic()

    def told(count: int) -> None:
        nonlocal news, told_at
        news += count
        if (now := time.monotonic()) >= told_at + _TELL_S:
            connection.send(news)
            news, told_at = 0, now

    try:
        while True:
            outcome = _carry_out(trace, connection.recv(), told)
            connection.send(news)
            news = 0
            connection.send(outcome)
    except (EOFError, ConnectionError):                  # whoever waited has gone
        pass
