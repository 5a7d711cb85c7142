"""Logs of several threads: each keeps its own lines, and none silences another or leaves a callback that is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xkv_gguf.runtime import log
from xkv_gguf.runtime.api import internals, llama_cpp


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """Lines that reach a callback which a program has installed."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        lines.append(text.decode())

    before = log._installed()
    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    yield lines
    llama_cpp.llama_log_set(*before)


@pytest.fixture
def fail(tmp_path: Path) -> Callable[[], None]:
    """Make the library log an error."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(16))

    def load() -> None:
        assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())

    return load


@pytest.mark.parametrize("quiet", [False, True])
def test_an_interruption_in_the_callback_is_not_lost(quiet: bool, fail: Callable[[], None]) -> None:
    """Where Ctrl-C is most often noticed while a model is loaded."""
    pressed: list[bool] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def press(_level: int, _text: bytes, _user_data: ctypes.c_void_p) -> None:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    before, handler = log._installed(), signal.getsignal(signal.SIGINT)
    llama_cpp.llama_log_set(press, ctypes.c_void_p(0))
    done = False
    try:
        with pytest.raises(KeyboardInterrupt), log.collect(quiet=False), log.collect(quiet=quiet):
            if quiet:
                signal.raise_signal(signal.SIGINT)
            fail()
            done = True
    finally:
        llama_cpp.llama_log_set(*before)
    assert done and signal.getsignal(signal.SIGINT) is handler


def in_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def test_collectors_that_end_in_the_order_they_began(heard: list[str], fail: Callable[[], None]) -> None:
    """As two constructors do in two threads: what is installed in the end is what was before, not the first one's."""
    before = log._address(log._installed()[0])
    first_in, first_out, second_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with log.collect(quiet=True):
            first_in.set()
            second_out.wait(10)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(10)
    with log.collect(quiet=True) as lines:
        second_out.set()
        first_out.wait(10)
        fail()
        assert lines
    thread.join()
    assert log._address(log._installed()[0]) == before
    heard.clear()
    fail()
    assert heard


def test_lines_belong_to_their_thread(heard: list[str], fail: Callable[[], None]) -> None:
    with log.collect(quiet=True) as lines:
        in_thread(fail)
        assert heard and not lines
        heard.clear()
        fail()
        assert lines and not heard


def test_an_outer_collector_goes_on_after_an_inner_one(fail: Callable[[], None]) -> None:
    with log.collect(quiet=True) as outer:
        with log.collect(quiet=True) as inner:
            pass
        fail()
    assert outer and not inner


def test_a_quiet_thread_silences_no_other(heard: list[str], fail: Callable[[], None]) -> None:
    def loud() -> None:
        with log.collect(quiet=False) as lines:
            fail()
            assert lines

    with log.collect(quiet=True):
        in_thread(loud)
    assert heard


def test_a_callback_that_a_program_installs_meanwhile_stays(fail: Callable[[], None]) -> None:
    before = log._installed()
    with log.collect(quiet=True):
        log.silence()
    assert log._same(log._installed()[0], log._drop)
    llama_cpp.llama_log_set(*before)


def test_the_output_of_the_process_stays_where_it_is() -> None:
    """llama_cpp's own way to be quiet does nothing where our log is: two threads would leave the output nowhere."""
    out, err = sys.stdout, os.fstat(2)
    with log.collect(quiet=True), vars(internals)["suppress_stdout_stderr"](disable=False):
        assert sys.stdout is out
        assert os.path.samestat(os.fstat(2), err)
