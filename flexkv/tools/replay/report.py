"""Results of a replay, and their output."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A result. Fields that do not apply are None.

    Attributes
    ----------
    policy : str
        An eviction policy, or ``opt`` or ``unbounded``.
    capacity_tokens : int
        Capacity of the host tier; for ``unbounded``, the number of different tokens of the trace. ``opt`` uses host and
        SSD as one tier.
    hit_rate : float
        Share of all blocks that were hits; the hits of a request are its leading blocks that are cached.
    host_hit_rate : float
        Share of all blocks that were hits in host memory.
    prefill_seconds_saved : float
        Estimated GPU seconds to compute the hits.
    ssd_drive_writes_per_day : float
        Number of times a day that the whole SSD tier is written.
    """

    trace: str
    policy: str
    capacity_tokens: int
    hit_rate: float
    requests: int
    blocks: int
    ssd_capacity_tokens: int | None = None
    host_hit_rate: float | None = None
    ssd_written_bytes: int | None = None
    ssd_drive_writes_per_day: float | None = None
    prefill_seconds_saved: float | None = None


_COLUMNS = {
    "trace": ("trace", "{:<28}"),
    "policy": ("policy", "{:<10}"),
    "capacity_tokens": ("tokens", "{:>12,}"),
    "ssd_capacity_tokens": ("SSD tokens", "{:>14,}"),
    "hit_rate": ("hit rate", "{:>9.4f}"),
    "host_hit_rate": ("of host", "{:>9.4f}"),
    "ssd_written_bytes": ("bytes to SSD", "{:>20,}"),
    "ssd_drive_writes_per_day": ("drive writes/day", "{:>18.3f}"),
    "prefill_seconds_saved": ("prefill s saved", "{:>17,.1f}"),
}


def show_json(lines: Iterable[Line]) -> None:
    """Print each result as soon as it is available, as one line of JSON without the fields that do not apply."""
    for line in lines:
        print(json.dumps({key: value for key, value in asdict(line).items() if value is not None}), flush=True)


def show_table(lines: Iterable[Line], columns: set[str]) -> None:
    """Print each result as soon as it is available, as a table row. ``columns``: optional columns to print."""
    optional = {key for key, default in Line.__dataclass_fields__.items() if default.default is None}
    chosen = [(key, *spec) for key, spec in _COLUMNS.items() if key not in optional or key in columns]
    widths = [spec.split(",")[0].split(".")[0].strip("{:}") for _, _, spec in chosen]
    head = "".join(f"{title:{width}} " for (_, title, _), width in zip(chosen, widths, strict=True)).rstrip()
    for number, line in enumerate(lines):
        if number == 0:                  # not earlier: no table head before an error of the trace
            print(head)
        cells = []
        for (key, _, spec), width in zip(chosen, widths, strict=True):
            value = getattr(line, key)
            cells.append(f"{'':{width}}" if value is None else spec.format(value))
        print(" ".join(cells).rstrip(), flush=True)
