"""Measurement of durations, and the output of results."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Line:
    """A result. Fields that do not apply are None.

    Attributes
    ----------
    value : float
        The result, in ``unit``.
    ceiling, ratio : float
        The best value possible on this machine, in ``unit``, and the ratio of ``value`` to it (1: equal).
    n : int
        Number of measurements.
    p50, p99 : float
        Percentiles, in ``unit``.
    """

    bench: str
    case: str
    value: float
    unit: str
    ceiling: float | None = None
    ratio: float | None = None
    n: int | None = None
    p50: float | None = None
    p99: float | None = None


def measure(function: Callable[[], object], n: int, warm_up: int = 3) -> NDArray[np.float64]:
    """Call a function ``n`` times; returns the duration of each call in microseconds, (n,)."""
    for _ in range(warm_up):
        function()
    took = np.empty(n)
    for i in range(n):
        start = time.perf_counter_ns()
        function()
        took[i] = time.perf_counter_ns() - start
    return took / 1e3


def line_of(bench: str, case: str, took: NDArray[np.float64], ceiling: float | None = None) -> Line:
    """Line with the p50 of durations in microseconds, and its ratio to a ceiling in microseconds."""
    p50, p99 = (round(float(np.percentile(took, q)), 2) for q in (50, 99))
    ratio = None if ceiling is None else round(ceiling / p50, 3)
    return Line(bench, case, p50, "us", None if ceiling is None else round(ceiling, 2), ratio, len(took), p50, p99)


def show(lines: Iterable[Line], as_json: bool) -> None:
    """Print each line as soon as it is available, as JSON or as a table row."""
    if not as_json:
        print(f"{'bench':<8} {'case':<54} {'value':>10} {'unit':<12}{'ceiling':>9} {'ratio':>6} {'p99':>10} {'n':>6}")
    for line in lines:
        if as_json:
            print(json.dumps(asdict(line)), flush=True)
            continue
        ceiling, ratio, p99, n = ("" if x is None else x for x in (line.ceiling, line.ratio, line.p99, line.n))
        print(
            f"{line.bench:<8} {line.case:<54} {line.value:>10} {line.unit:<12}{ceiling:>9} {ratio:>6} {p99:>10} {n:>6}",
            flush=True,
        )
