"""Ctrl-C while the native library works.

Python runs a signal's handler when it gets to its next line. While the library works, that line is often one of the
log callback, where an exception goes nowhere: the interruption would be lost, and the program go on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def held() -> Iterator[None]:
    """Put an interruption off until the end, in the thread that gets them. Handlers that are not Python's stay."""
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before) or before is _keep:
        yield
        return
    _kept.clear()
    signal.signal(signal.SIGINT, _keep)
    try:
        yield
    finally:
        # a handler that was installed meanwhile stays
        if signal.getsignal(signal.SIGINT) is _keep:
            signal.signal(signal.SIGINT, before)
        if _kept:
            before(*_kept.pop())


_kept: list[tuple[int, FrameType | None]] = []


def _keep(number: int, frame: FrameType | None) -> None:
    _kept.append((number, frame))
