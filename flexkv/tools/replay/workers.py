"""Replays of one trace, in this process or in several worker processes."""

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
"""Name of the clairvoyant cache, used in place of a policy."""

_REPORT_S = 0.1
"""Interval in seconds at which a worker reports its progress, and detects that its parent has ended."""
_TERMINATE_S = 10.0
"""Maximum wait for a worker that was terminated, in seconds; then it is killed."""


class WorkerError(FlexKVError, RuntimeError):
    """Replays cannot be distributed over processes, or a worker process ended too early."""


@dataclass(frozen=True, slots=True)
class Task:
    """One replay: a policy, or ``OPT``, at one capacity. The fields are parameters of ``Simulation``."""

    policy: str
    host_blocks: int
    ssd_blocks: int = 0
    write_all: bool = False


def outcomes(trace: Trace, tasks: Sequence[Task], jobs: int = 1) -> Generator[Outcome]:
    """Iterate over the outcomes of the tasks, in the order of the tasks.

    With more than one job, worker processes share the work, at most one for each task. They have ended when the
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
                bar.clear()                              # the caller prints the outcome now
                yield outcome


def _carry_out(trace: Trace, task: Task, report: Callable[[int], object]) -> Outcome:
    if task.policy == OPT:
        return Outcome(optimal_hits(trace, task.host_blocks + task.ssd_blocks))
    return Simulation(task.policy, task.host_blocks, task.ssd_blocks, task.write_all).run(trace, report)


# ---- this process ---------------------------------------------------------------------------------------------------


def _side_by_side(
    trace: Trace, tasks: Sequence[Task], jobs: int, report: Callable[[int], object]
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
                            report(message)
                yield done.pop(number)
        except (EOFError, ConnectionError) as error:
            raise WorkerError(
                "a worker process ended too early, possibly because memory was exhausted: try fewer --jobs"
            ) from error


@contextmanager
def _workers(shared: "SharedTrace", count: int) -> Iterator[list[Connection]]:
    """Start ``count`` worker processes, and end them at the end; yields a connection to each."""
    context = get_context("spawn")
    processes, connections = [], []
    resource_tracker.ensure_running()                    # else the first start does it, and unblocks SIGINT
    # The keyboard sends SIGINT to all processes of the terminal. Workers inherit the mask; this process ends them.
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
    """Write a trace to an unnamed file, which other processes can map within the context."""
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
    """File that contains the arrays of a trace one after another, all with items of 8 bytes."""

    path: str
    name: str
    block_tokens: int
    is_timed: bool
    num_requests: int
    num_blocks: int

    def open(self) -> Trace:
        """Map the trace; the memory is shared by all processes."""
        words = np.asarray(np.memmap(self.path, dtype=np.uint64, mode="r"))
        ends = np.cumsum([self.num_requests, self.num_requests + 1, 2 * self.num_blocks])
        seconds, starts, keys, next_use = np.split(words, ends)
        return Trace(
            self.name, self.block_tokens, seconds.view(np.float64), starts.view(np.int64), keys.reshape(-1, 2),
            next_use.view(np.int64), self.is_timed,
        )


def _work(connection: Connection, shared: SharedTrace) -> None:
    """Run the tasks that arrive on a connection, until its other end is closed."""
    trace = shared.open()
    news, reported_at = 0, time.monotonic()

    def report(count: int) -> None:
        nonlocal news, reported_at
        news += count
        if (now := time.monotonic()) >= reported_at + _REPORT_S:
            connection.send(news)
            news, reported_at = 0, now

    try:
        while True:
            outcome = _carry_out(trace, connection.recv(), report)
            connection.send(news)
            news = 0
            connection.send(outcome)
    except (EOFError, ConnectionError):                  # the parent has ended
        pass
