"""Limit of the memory that this process may use."""

from pathlib import Path

_LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes", "memory.limit_in_bytes")


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory: the smallest of the machine's memory and the limits of this process's control groups (v1, v2).

    None: the system reports neither.

    Parameters
    ----------
    root : Path
        Directory that contains ``proc`` and ``sys``; for tests.
    """
    limits = []
    for line in _lines(root / "proc/meminfo"):
        words = line.split()
        if words[:1] == ["MemTotal:"] and words[1:2] and words[1].isdecimal():
            limits.append(int(words[1]) * 1024)
    cgroups = root / "sys/fs/cgroup"
    places = {cgroups}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        base = cgroups / "memory" if "memory" in controllers.split(",") else cgroups
        group = base / path.lstrip("/")
        places.update([group, *(parent for parent in group.parents if cgroups in parent.parents)])
    for place in places:
        for name in _LIMIT_FILES:
            text = "".join(_lines(place / name)).strip()
            if text.isdecimal():
                limits.append(int(text))
    return min(limits, default=None)


def _lines(path: Path) -> list[str]:
    """Lines of a system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
