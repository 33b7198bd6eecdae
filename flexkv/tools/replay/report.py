"""One result of a replay, and how it is printed."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A result; what does not apply is None.

    Attributes
    ----------
    policy : str
        An eviction policy, or ``opt`` or ``unbounded``.
    capacity_tokens : int
        Of the host tier; of ``unbounded``, the different tokens of the trace. ``opt`` has both tiers as one.
    hit_rate : float
        Leading blocks of requests that were there, of all blocks.
    host_hit_rate : float
        Those that were in host memory.
    prefill_seconds_saved : float
        GPU seconds that computing the hits would take: an estimate.
    ssd_drive_writes_per_day : float
        How often a day the SSD tier is written over.
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
    """One JSON object a line, as soon as it is there, without what does not apply."""
    for line in lines:
        print(json.dumps({key: value for key, value in asdict(line).items() if value is not None}), flush=True)


def show_table(lines: Iterable[Line], columns: set[str]) -> None:
    """A row for each, as soon as it is there; ``columns``: of those that do not always apply."""
    optional = {key for key, default in Line.__dataclass_fields__.items() if default.default is None}
    chosen = [(key, *spec) for key, spec in _COLUMNS.items() if key not in optional or key in columns]
    widths = [spec.split(",")[0].split(".")[0].strip("{:}") for _, _, spec in chosen]
    head = "".join(f"{title:{width}} " for (_, title, _), width in zip(chosen, widths, strict=True)).rstrip()
    for number, line in enumerate(lines):
        if number == 0:                  # not earlier: an error of the trace must not stand below a table
            print(head)
        cells = []
        for (key, _, spec), width in zip(chosen, widths, strict=True):
            value = getattr(line, key)
            cells.append(f"{'':{width}}" if value is None else spec.format(value))
        print(" ".join(cells).rstrip(), flush=True)
