"""What memory there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def free_memory() -> int | None:
    """Bytes that a process can still get, of the machine and of its control group; None where nothing tells them."""
    found = [_field("/proc/meminfo", "MemAvailable:", 1024)]
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        # file pages count as used, and are given back
        cached = _field("/sys/fs/cgroup/memory.stat", "inactive_file", 1) or 0
        found.append(limit - used + cached)
    known = [n for n in found if n is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _field(path: str, name: str, unit: int) -> int | None:
    rows: Sequence[str]
    try:
        rows = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((int(row.split()[1]) * unit for row in rows if row.split()[:1] == [name]), None)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
