"""The command ``flexkv inspect``: the contents of directories of the SSD tier."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from flexkv.errors import StorageError
from flexkv.storage.ssd.directory import DATA_NAME, TABLE_NAME
from flexkv.storage.ssd.directory_lock import owner_of
from flexkv.storage.ssd.slot_table import SlotTable


def describe(directory: Path) -> dict[str, Any]:
    """Describe the contents of a directory without changing it. The directory may be in use.

    Returns
    -------
    dict
        ``slots`` counts slots by content: ``used``, ``void`` (cleared, or of another size), ``broken``,
        ``unreadable``, ``empty``. ``domains`` counts used slots by the digest of their domain.

    Raises
    ------
    StorageError
        The directory has no slot table, or this version cannot read the table.
    """
    try:
        fd = os.open(directory / TABLE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        where = f"{directory} is not a directory of the SSD tier: " if isinstance(error, FileNotFoundError) else ""
        raise StorageError(f"{where}{directory / TABLE_NAME} cannot be read: {error.strerror}") from error
    try:
        table = SlotTable(fd, os)
        header = table.load()
        if header is None:
            raise StorageError(f"{directory / TABLE_NAME} is not a slot table that this version can read")
        scan = table.scan(0)
    finally:
        os.close(fd)
    data = directory / DATA_NAME
    return {
        "directory": str(directory),
        "used_by": owner_of(directory) or None,
        "closed_cleanly": header.clean,
        "slot_bytes": header.slot_bytes,
        "num_slots": header.num_slots,
        "data_bytes": data.stat().st_size if data.exists() else None,
        "slots": {
            "used": scan.states["other_domain"] + scan.states["mine"],
            **{state: scan.states[state] for state in ("void", "broken", "unreadable", "empty")},
        },
        "domains": {f"{digest:016x}": count for digest, count in sorted(scan.domains.items())},
        "last_cleared": None if header.floor == 0 else _date(header.floor),
    }


def _date(sequence: int) -> str:
    """Format a floor, which is the time of the last clearing in nanoseconds since 1970."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(sequence / 1e9))


def main(argv: list[str]) -> int:
    """Describe directories, as text or as JSON."""
    parser = argparse.ArgumentParser(
        prog="flexkv inspect", description="Show the contents of directories of the SSD tier."
    )
    parser.add_argument("directory", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    for directory in args.directory:
        found = describe(directory)
        if args.json:
            print(json.dumps(found))
        else:
            _show(directory, found)
    return 0


def _show(directory: Path, found: dict[str, Any]) -> None:
    slots = ", ".join(f"{count} {state}" for state, count in found["slots"].items() if count)
    print(f"{directory}: {found['num_slots']} slots of {found['slot_bytes']} bytes: {slots}")
    if found["used_by"]:
        state = f"used by {found['used_by']}"
    else:
        state = f"not in use; {'closed cleanly' if found['closed_cleanly'] else 'not closed cleanly'}"
    print(f"  {state}; last cleared: {found['last_cleared'] or 'never'}")
    missing = found["num_slots"] * found["slot_bytes"] - (found["data_bytes"] or 0)
    if found["data_bytes"] is None:
        print(f"  {DATA_NAME} is missing: no block can be read; the next start removes the records")
    elif missing > 0:
        print(f"  {DATA_NAME} is too short by {missing} bytes: blocks at its end cannot be read")
    for digest, count in found["domains"].items():
        print(f"  domain {digest}: {count} blocks, {count * found['slot_bytes'] / (1 << 30):.3f} GiB")
