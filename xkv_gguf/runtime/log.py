"""The native library's log: error lines are kept, so that a failure can say why."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .api import llama_cpp

# enum ggml_log_level; llama_cpp's own table is of another version of it
LEVEL_WARN = 3
LEVEL_ERROR = 4


@contextmanager
def collect(quiet: bool) -> Iterator[list[str]]:
    """Keep the error lines that the native library logs inside.

    Parameters
    ----------
    quiet : bool
        Whether nothing is passed on to the log callback that is installed now.

    Yields
    ------
    list of str
        Grows while the library logs errors; one line each.
    """
    lines: list[str] = []
    before, user_data = _installed()

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        if level == LEVEL_ERROR:
            lines.append(" ".join(text.decode("utf-8", errors="replace").split()))
        if not quiet and before:
            before(level, text, user_data)

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, user_data)


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
