"""How many threads there are to use."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_decode_threads() -> int:
    """Threads for one token at a time, which are bound by memory: half of the processors."""
    return max(default_threads() // 2, 1)
