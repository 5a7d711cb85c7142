"""Text files: results appear whole or not at all, and what cannot be read is told in one line."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from ..errors import OptionError


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under another name and rename it when it is complete.

    Raises
    ------
    OptionError
        The folder does not exist or cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp's files are private
        os.replace(name, path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


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
