"""The native library's log: error lines are kept, so that a failure can say why.

llama.cpp has one log callback for the whole process. While lines are collected it is ours, which lives as long as the
process, and the thread that a line comes from tells whom it belongs to.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from . import interrupt
from .api import internals, llama_cpp, llama_cpp_logger, llama_cpp_module, suppress_stdout_stderr

# of enum ggml_log_level; llama_cpp's own table is of another version of it
LEVEL_ERROR = 4


@dataclass(eq=False)
class _Collector:
    """Error lines of one thread, and whether its log goes no further. Two are never the same, whatever they hold."""

    quiet: bool
    lines: list[str] = field(default_factory=list)


class _OfThread(threading.local):
    """The collectors of a thread, innermost last."""

    def __init__(self) -> None:
        self.collectors: list[_Collector] = []


@dataclass
class _State:
    """How many collectors there are in all threads, and the callback that was installed before the first."""

    n_collector: int = 0
    before: tuple[Any, ctypes.c_void_p] = (None, ctypes.c_void_p())


_of_thread = _OfThread()
_state = _State()
_lock = threading.Lock()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    collectors = _of_thread.collectors
    if level == LEVEL_ERROR:
        for collector in collectors:
            collector.lines.append(" ".join(text.decode("utf-8", errors="replace").split()))
    if any(collector.quiet for collector in collectors):
        return
    callback, user_data = _state.before
    if collectors and _same(callback, llama_cpp_logger.llama_log_callback):
        # that one drops lines for the whole process where any object is quiet
        print(text.decode("utf-8", errors="replace"), end="", flush=True, file=sys.stderr)
    elif callback:
        callback(level, text, user_data)


@contextmanager
def collect(quiet: bool) -> Iterator[list[str]]:
    """Keep the error lines that the native library logs inside, in this thread.

    Parameters
    ----------
    quiet : bool
        Whether nothing of this thread is passed on to the log callback that is installed now.

    Yields
    ------
    list of str
        Grows while the library logs errors; one line each.

    An interruption (Ctrl-C) comes at the end: in the callback, it would be lost.
    """
    with interrupt.held(), _collected(quiet) as lines:
        yield lines


@contextmanager
def _collected(quiet: bool) -> Iterator[list[str]]:
    collector = _Collector(quiet)
    with _lock:
        installed = _installed()
        if not _same(installed[0], _keep):
            _state.before = installed
            llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))
        _state.n_collector += 1
    _of_thread.collectors.append(collector)
    try:
        yield collector.lines
    finally:
        _of_thread.collectors.remove(collector)
        with _lock:
            _state.n_collector -= 1
            # another callback may have been installed meanwhile
            if _state.n_collector == 0 and _same(_installed()[0], _keep):
                llama_cpp.llama_log_set(*_state.before)


class _Suppress(suppress_stdout_stderr):
    """llama_cpp's way to be quiet: it points the output of the whole process elsewhere.

    Other threads print there, and two that do so at once leave it there. Where our own log is quiet, nothing is to be
    hidden.
    """

    def __init__(self, disable: bool = True) -> None:
        super().__init__(disable or bool(_of_thread.collectors))


for _module in (internals, llama_cpp_module):
    vars(_module)["suppress_stdout_stderr"] = _Suppress


def reason(lines: Sequence[str]) -> str:
    """The line that says most: the first one, without the name of the native function in front."""
    for line in lines:
        head, colon, tail = line.partition(": ")
        text = tail if colon and " " not in head else line
        if text:
            return text
    return ""


def silence() -> None:
    """Drop the native log from here on: for programs that report errors themselves."""
    llama_cpp.llama_log_set(_drop, ctypes.c_void_p(0))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _drop(_level: int, _text: bytes, _user_data: ctypes.c_void_p) -> None:
    pass


def _installed() -> tuple[Any, ctypes.c_void_p]:
    """The callback that is installed now, with its user data."""
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    return callback, user_data


def _same(one: Any, other: Any) -> bool:
    """Whether two callbacks are the same C function."""
    return bool(one) and _address(one) == _address(other)


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value
