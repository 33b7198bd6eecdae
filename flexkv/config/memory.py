"""How much memory this process may use."""

from pathlib import Path

_LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes", "memory.limit_in_bytes")


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes: the smallest of the machine's memory and the limits of this process's control groups (v1 and v2).

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are; for tests.
    """
    limits = []
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    cgroups = root / "sys/fs/cgroup"
    places = {cgroups}
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            controllers, path = line.split(":", 2)[1:]
            base = cgroups / "memory" if "memory" in controllers.split(",") else cgroups
            group = base / path.lstrip("/")
            places.update([group, *(parent for parent in group.parents if cgroups in parent.parents)])
    except FileNotFoundError:
        pass                      # no control groups
    for place in places:
        for name in _LIMIT_FILES:
            try:
                text = (place / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return min(limits)
