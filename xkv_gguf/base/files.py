"""Files: results appear whole or not at all, and what cannot be read is told in one line."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import OptionError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another path of the same name, whose file takes the place of `path` if all goes well; else it goes.

    Raises
    ------
    OSError
        The folder of `path` does not exist or cannot be written to.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temp = Path(folder) / path.name
        yield temp
        temp.replace(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, which appears when it is complete.

    Raises
    ------
    OptionError
        The folder does not exist or cannot be written to.
    """
    try:
        with replacing(path) as temp:
            temp.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_writable(path: Path) -> None:
    """Refuse an output path early, before work is done for it.

    Raises
    ------
    OptionError
        It is a folder, or its folder does not exist or cannot be written to.
    """
    folder = path.parent
    if path.is_dir():
        raise OptionError(f"{path}: is a folder, expected a file name")
    if not folder.is_dir():
        raise OptionError(f"{path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise OptionError(f"{path}: the folder {folder} cannot be written to")


def read_text(path: str) -> str:
    """Read a UTF-8 text file, or standard input for "-".

    Raises
    ------
    OptionError
        It cannot be read or is not UTF-8.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
